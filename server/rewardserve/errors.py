"""Everything that can go wrong, each with its status on the wire.

RewardServeError
├── InvalidRequest        INVALID_ARGUMENT     the request is malformed; names the field and the limit
├── ModelNotFound         NOT_FOUND
├── ModelExists           ALREADY_EXISTS
├── ControlDisabled       PERMISSION_DENIED    Load and Unload are switched off
├── LoadFailed            FAILED_PRECONDITION  the checkpoint cannot be served, and why
│   ├── OptionsDoNotFit                        not with these options, on this device
│   └── Unloaded                               before it was loaded, as somebody wished
├── SwapRefused           FAILED_PRECONDITION  the new version did not pass; the old one serves on
├── ItemFailed            (the item's code)    a call about single responses, and one has no score
├── InternalError         INTERNAL             a bug of ours; the log has it
├── Overloaded            RESOURCE_EXHAUSTED   come back in `retry_after_s`
├── DeadlineExceeded      DEADLINE_EXCEEDED
└── Unavailable           UNAVAILABLE          try again, here or elsewhere
    ├── EngineDied                             the engine process ended with the work in it
    └── Draining                               the server, or the model, is shutting down

What concerns one of many responses is no exception: it is an `ItemFailure` among the scores (types.py).
"""

BACK_SOON_S = 1.0  # to ask again after, where an engine or a server starts anew
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as torch says it of GPUs and of CPUs


class RewardServeError(Exception):
    """Base of all errors a caller may see. `grpc` names a grpc.StatusCode."""

    grpc: str


class InvalidRequest(RewardServeError):
    grpc = "INVALID_ARGUMENT"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class ModelNotFound(RewardServeError):
    grpc = "NOT_FOUND"


class ModelExists(RewardServeError):
    grpc = "ALREADY_EXISTS"


class ControlDisabled(RewardServeError):
    grpc = "PERMISSION_DENIED"


class LoadFailed(RewardServeError):
    grpc = "FAILED_PRECONDITION"


class OptionsDoNotFit(LoadFailed):
    """The engine could serve the checkpoint otherwise: no case for another engine."""


class Unloaded(LoadFailed):
    """Nothing is wrong with the checkpoint."""


class SwapRefused(RewardServeError):
    grpc = "FAILED_PRECONDITION"


class ItemFailed(RewardServeError):
    def __init__(self, code: str, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.grpc = code
        self.field = field
        self.description = description


class InternalError(RewardServeError):
    grpc = "INTERNAL"


class Overloaded(RewardServeError):
    grpc = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RewardServeError):
    grpc = "DEADLINE_EXCEEDED"


class Unavailable(RewardServeError):
    grpc = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: where it will be back by itself, when it is worth asking again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDied(Unavailable):
    pass


class Draining(Unavailable):
    pass


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)
