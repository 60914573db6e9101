"""The errors a user can cause, as one small tree.

    ClipserveError            exit code 2, HTTP 400
    |- ConfigError            a setting: unknown, out of range, contradictory
    |- CheckpointError        a model or run directory: missing, damaged, of a newer format
    |- DataError              a source or a shard: unreadable, empty, malformed
    |  |- SampleError         one sample: its bytes changed, or cannot be read
    |  `- TooManyBadSamples   more bad samples than the stated fraction (exit code 3)
    |- TrainingError          a run that cannot go on: it lost a process, say (exit code 1)
    |  `- TooManySkippedSteps it diverged, or many samples are broken (exit code 3)
    |- ImageError             a picture: too large, not a picture, damaged
    |- TextError              a text: empty where one is needed
    |- IndexStoreError        a collection or an index: damaged, of another model, read-only
    |  |- CollectionClosed    a collection that was closed, or dropped, before it was asked
    |  |- DiskFull            nothing more can be written, until there is room again
    |  |- ItemTooLarge        an item whose texts and metadata are longer than is stored
    |  `- FilterError         a filter that is not one: unknown operator, wrong type, too large
    `- ServiceError          what `clipserve.Client` was answered
       |- ServiceUnreachable no answer: refused, broken off, or too late
       |- ServiceOverloaded  429 or 503: come back later
       |- ServiceFailed      another 5xx: the fault is the service's
       |- AccessDenied       401 or 403: the API key is missing, unknown, or of too small a scope
       `- RequestRefused     another 4xx: the request has to change
          |- NotThere        404: no such model, collection, item or job
          `- ItemRefused     one of the items that were sent

A warning of the client's, `TextTruncated`, is beside it.

Every message says what, the value, what is allowed, and what to do.
"""

_WOULD_COME_AGAIN = 3  # the exit code: the same run would end in the same way


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

    exit_code = _WOULD_COME_AGAIN


class TrainingError(ClipserveError):
    """A run cannot go on; one of its processes is gone, say."""

    exit_code = 1


class TooManySkippedSteps(TrainingError):
    """Too many steps of a run could not be taken."""

    exit_code = _WOULD_COME_AGAIN


class ImageError(ClipserveError):
    """Bytes that are not an acceptable picture. The message never echoes the bytes."""


class TextError(ClipserveError):
    """A text that cannot be embedded."""


class IndexStoreError(ClipserveError):
    """A collection or an index is damaged, made by another model, or not writable."""


class CollectionClosed(IndexStoreError):
    """A collection was closed before it was asked."""


class DiskFull(IndexStoreError):
    """There is no room on the disk for a write; what was there stays."""


class ItemTooLarge(IndexStoreError):
    """An item has more text and metadata than a collection stores of one."""


class FilterError(IndexStoreError):
    """A filter over metadata is not of the filter language, or larger than allowed."""


class ServiceError(ClipserveError):
    """A service gave no answer, or one that is an error; `code` is its name, for programs."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """of the HTTP answer; None where there was none"""
        self.code = code
        self.param = param
        """the part of the request that it is about"""


class ServiceUnreachable(ServiceError):
    """Nothing listens there, the connection broke, or the answer took too long."""


class ServiceOverloaded(ServiceError):
    """The service has more to do than it takes on, or is starting or stopping."""

    retry_after_s: float | None = None
    """when to come back, if the service said so"""


class ServiceFailed(ServiceError):
    """The service could not answer, and says that this is its own fault."""


class AccessDenied(ServiceError):
    """The API key is missing, unknown, or not allowed to do this."""


class RequestRefused(ServiceError):
    """The same request would be refused again."""


class NotThere(RequestRefused):
    """The service has no such model, collection, item or job."""


class ItemRefused(RequestRefused):
    """One item of a call; the others can be answered."""

    index: int = -1
    """its place among those that were given"""


class TextTruncated(UserWarning):
    """A text did not fit into the model's context, and what is behind it counted for nothing."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says, for a message of ours; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
