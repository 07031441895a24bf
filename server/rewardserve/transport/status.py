"""Errors -> google.rpc.Status with the details the standard knows: which field, when to retry."""

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from rewardserve.errors import InvalidRequest, ItemFailed, Overloaded, RewardServeError, Unavailable

MAX_MESSAGE_BYTES = 1000  # three times in the trailers, once percent-encoded; clients take 8 KiB of them


def status_of(error: RewardServeError) -> status_pb2.Status:
    code: int = grpc.StatusCode[error.grpc].value[0]
    details = [_any(detail) for detail in _details(error)]
    return status_pb2.Status(code=code, message=_short(str(error)), details=details)


def _short(text: str) -> str:
    """Callers' own words come back in messages, and may be of any length; those of a chat template may be no UTF-8."""
    data = text.encode(errors="backslashreplace")
    return data.decode() if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


def _details(error: RewardServeError) -> list[message.Message]:
    match error:
        case InvalidRequest() | ItemFailed(grpc="INVALID_ARGUMENT"):
            description = _short(error.description)
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=description)
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case Overloaded(retry_after_s=float(seconds)) | Unavailable(retry_after_s=float(seconds)):
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(seconds * 1e9))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def _any(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
