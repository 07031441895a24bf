"""Everything that can go wrong, as exceptions. Knows gRPC's status codes, but neither channels nor messages.

RewardClientError
├── InvalidRequest      the request is malformed; `violations` names the fields
├── ModelNotFound       no model of that name is served there
├── Overloaded          the server is full (`retry_after_s` says for how long), or a message is larger than it takes
├── DeadlineExceeded    the call's own time ran out
├── Unavailable         nobody answered, as long as it was tried
├── PermissionDenied    the server will not do this, or not for this caller
├── ServerError         any other status; `code` says which
├── ItemFailed          one response has no score, and its score was asked for
└── VersionMismatch     the parts of one answer come from different models

Mistakes that no server has seen (a prompt of the wrong type, an unknown overflow policy) are TypeError and ValueError;
using a closed client is a RuntimeError. All of the above can be pickled, for they cross processes in trainers.
"""

from collections.abc import Mapping, Sequence

import grpc


class RewardClientError(Exception):
    """The root of the tree; never a score, never swallowed."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        endpoint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.endpoint = endpoint  # who said so; None where no server was asked
        self.retry_after_s = retry_after_s  # the server's wish (google.rpc.RetryInfo); None where it had none
        self.is_reply = False  # whether a server of ours said it; if not, the connection did
        self.attempts = 1  # set by the retrying call when it gives up
        self.before = ""  # and what was failed of before, where the last attempt only ran out of time

    def __str__(self) -> str:
        code = f"{self.code.name}: " if self.code is not None else ""
        where = f" [{self.endpoint}]" if self.endpoint else ""
        tries = f" (after {self.attempts} attempts)" if self.attempts > 1 else ""
        before = f"; before that: {self.before}" if self.before else ""
        return f"{code}{self.message}{where}{tries}{before}"


class InvalidRequest(RewardClientError):
    """Sending it again cannot help. `violations` are (field, description) pairs from google.rpc.BadRequest."""

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[tuple[str, str]] = (),
        code: grpc.StatusCode | None = grpc.StatusCode.INVALID_ARGUMENT,
        endpoint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, endpoint=endpoint, retry_after_s=retry_after_s)
        self.violations = list(violations)


class ModelNotFound(RewardClientError):
    """`list_models()` says which names are served."""


class Overloaded(RewardClientError):
    """`retry_after_s` is None where the server named no time: then the message was too large, or a proxy refused it."""


class DeadlineExceeded(RewardClientError):
    """The `timeout` of the call passed, retries included."""


class Unavailable(RewardClientError):
    """No endpoint could be reached, or the model is restarting or draining everywhere."""


class PermissionDenied(RewardClientError):
    """PERMISSION_DENIED or UNAUTHENTICATED."""


class ServerError(RewardClientError):
    """The server answered with a status that has no class of its own, or with a reply that does not fit the request."""


class ItemFailed(RewardClientError):
    """Raised by reading `.score` of a response that could not be scored; `code` and `message` are the item's status."""


class VersionMismatch(RewardClientError):
    """Scores of different models cannot be compared, so they are not mixed. `versions`: endpoint -> "name version"."""

    def __init__(self, message: str, *, versions: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.versions = dict(versions or {})
