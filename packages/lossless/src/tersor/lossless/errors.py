"""What can be wrong with a packed file. Every error names the file and, where there is one, tensor and block."""


class LosslessError(ValueError):
    """A file cannot be packed or unpacked as it stands."""


class CorruptFile(LosslessError):
    """The bytes contradict the format or their checksums: cut short, altered, or never what the name says."""


class NotPacked(LosslessError):
    """The file is no packed file at all."""


class UnsupportedVersion(LosslessError):
    """A newer tersor.lossless wrote the file."""
