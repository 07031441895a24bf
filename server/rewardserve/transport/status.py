"""Errors -> google.rpc.Status with the details the standard knows: which field, when to retry."""

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from rewardserve.errors import InvalidRequest, Overloaded, RewardServeError


def status_of(error: RewardServeError) -> status_pb2.Status:
    code: int = grpc.StatusCode[error.grpc].value[0]
    return status_pb2.Status(code=code, message=str(error), details=[_any(detail) for detail in _details(error)])


def _details(error: RewardServeError) -> list[message.Message]:
    match error:
        case InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case Overloaded():
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def _any(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
