"""Errors that speechtok raises on purpose.

Every message says what was wrong, with which file or field, and how to mend it.
"""

__all__ = [
    "AudioError",
    "CheckpointError",
    "FingerprintError",
    "FormatError",
    "InputError",
    "OutputError",
    "SpeechtokError",
    "UnknownNameError",
]


class SpeechtokError(Exception):
    """Base of all errors that a user can mend."""


class AudioError(SpeechtokError):
    """A sound file or array cannot be turned into a usable wave."""


class InputError(SpeechtokError):
    """An input folder, manifest, archive or option is unusable."""


class OutputError(SpeechtokError):
    """Results cannot be written where they were asked for."""


class FormatError(SpeechtokError):
    """A file of units, centroids or configuration is malformed."""


class CheckpointError(SpeechtokError):
    """Model weights do not fit the model: keys, shapes or values."""


class FingerprintError(SpeechtokError):
    """Data or a model belongs to another tokenizer than the one at hand."""


class UnknownNameError(SpeechtokError):
    """A tokenizer or encoder name is neither a path, nor shipped, nor published."""
