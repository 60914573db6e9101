"""The errors a user can cause, as one small tree.

    ClipserveError            exit code 2, HTTP 400
    |- ConfigError            a setting: unknown, out of range, contradictory
    |- CheckpointError        a model or run directory: missing, damaged, of a newer format
    |- DataError              a source or a shard: unreadable, empty, malformed
    |  |- SampleError         one sample: its bytes changed, or cannot be read
    |  `- TooManyBadSamples   more bad samples than the stated fraction (exit code 1)
    |- TrainingError          a run that cannot go on: its loss is not finite (exit code 1)
    |- ImageError             a picture: too large, not a picture, damaged
    |- TextError              a text: empty where one is needed
    `- IndexStoreError        a collection or an index: damaged, of another model, read-only
       `- FilterError         a filter that is not one: unknown operator, wrong type, too large

Every message says what, the value, what is allowed, and what to do.
"""


class ClipserveError(Exception):
    """Something the user can put right; `str(error)` is one line that says how."""

    exit_code = 2


class ConfigError(ClipserveError):
    """A setting is unknown, out of range, or contradicts another."""


class CheckpointError(ClipserveError):
    """A model or run directory is missing, damaged, or of a format this version cannot read."""


class DataError(ClipserveError):
    """A source of samples cannot be read as described."""


class SampleError(DataError):
    """One sample cannot be read as its manifest describes it; the others can.

    `kind` is countable: "changed" or "read_error".
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return type(self), (str(self), self.kind)  # it crosses from a worker to its parent


class TooManyBadSamples(DataError):
    """More samples were bad than the run allows; the good ones were kept."""

    exit_code = 1


class TrainingError(ClipserveError):
    """A run diverged; its last checkpoint is good."""

    exit_code = 1


class ImageError(ClipserveError):
    """Bytes that are not an acceptable picture. The message never echoes the bytes."""


class TextError(ClipserveError):
    """A text that cannot be embedded."""


class IndexStoreError(ClipserveError):
    """A collection or an index is damaged, made by another model, or not writable."""


class FilterError(IndexStoreError):
    """A filter over metadata is not of the filter language, or larger than allowed."""
