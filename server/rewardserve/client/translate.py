"""gRPC's failures -> the client's errors: the one boundary. Beyond it nobody sees a grpc.RpcError."""

from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from rewardserve.client import errors

Code: TypeAlias = grpc.StatusCode
CODES = {code.value[0]: code for code in Code}  # by google.rpc.Code number

_CLASSES: dict[Code, type[errors.RewardClientError]] = {
    Code.INVALID_ARGUMENT: errors.InvalidRequest,
    Code.OUT_OF_RANGE: errors.InvalidRequest,
    Code.NOT_FOUND: errors.ModelNotFound,
    Code.RESOURCE_EXHAUSTED: errors.Overloaded,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    Code.UNAVAILABLE: errors.Unavailable,
    Code.ABORTED: errors.Unavailable,  # transient as well, and retried as long as there was time
    # Nobody here has cancelled it, for that is no RpcError: a server that ends did, or a proxy, before it was read.
    Code.CANCELLED: errors.Unavailable,
    Code.PERMISSION_DENIED: errors.PermissionDenied,
    Code.UNAUTHENTICATED: errors.PermissionDenied,
}


def from_rpc_error(error: grpc.RpcError, endpoint: str) -> errors.RewardClientError:
    """Of a whole call."""
    code = error.code() if hasattr(error, "code") else Code.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    if not details:  # str(error) would be a page about grpc's own objects
        details = "nothing more was said"
    return _error(code, details, _rich_status(error), endpoint)


def from_status(status: status_pb2.Status, endpoint: str) -> errors.RewardClientError:
    """Of one request of a stream."""
    return _error(CODES.get(status.code, Code.UNKNOWN), status.message, status, endpoint)


def _error(code: Code, message: str, rich: status_pb2.Status | None, endpoint: str) -> errors.RewardClientError:
    retry_info = _detail(rich, error_details_pb2.RetryInfo())
    retry_after_s = None if retry_info is None else retry_info.retry_delay.ToTimedelta().total_seconds()
    cls = _CLASSES.get(code, errors.ServerError)
    if cls is errors.InvalidRequest:
        return errors.InvalidRequest(message, code=code, endpoint=endpoint, violations=_violations(rich))
    error = cls(message, code=code, endpoint=endpoint, retry_after_s=retry_after_s)
    error.is_reply = rich is not None
    return error


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(error)
    except (AttributeError, ValueError, DecodeError):
        return None  # no details, or details that contradict the status: the plain status stands


def _violations(rich: status_pb2.Status | None) -> list[tuple[str, str]]:
    bad_request = _detail(rich, error_details_pb2.BadRequest())
    return [] if bad_request is None else [(v.field, v.description) for v in bad_request.field_violations]


def _detail(rich: status_pb2.Status | None, wanted: Message) -> Message | None:
    for detail in rich.details if rich is not None else ():
        if detail.Is(wanted.DESCRIPTOR):
            try:
                detail.Unpack(wanted)
            except DecodeError:
                return None
            return wanted
    return None
