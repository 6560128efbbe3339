"""What `cached` raises for a model that it cannot serve."""


class UnsupportedModel(ValueError):
    """The granularity found no site in this model; the message lists what it looked for and what there is."""
