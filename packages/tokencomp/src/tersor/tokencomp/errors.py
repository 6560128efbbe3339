"""What can be wrong with a model."""


class UnsupportedModel(TypeError):
    """The model has no tower that can be slimmed; the message lists what is supported."""
