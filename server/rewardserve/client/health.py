"""grpc.health.v1's two messages, made here: the base install has no grpcio-health-checking.

They live in a descriptor pool of their own, so that the real package may be imported beside them.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

CHECK = "/grpc.health.v1.Health/Check"
_Field = descriptor_pb2.FieldDescriptorProto


def service_name(model: str) -> str:
    """The health service of one model, or of the server as a whole where `model` is empty."""
    return f"rewardserve.v1.Scoring/{model}" if model else ""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="grpc/health/v1/health.proto", package="grpc.health.v1")
    file.syntax = "proto3"
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    response = file.message_type.add(name="HealthCheckResponse")
    status = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        status.value.add(name=name, number=number)
    response.field.add(
        name="status",
        number=1,
        type=_Field.TYPE_ENUM,
        type_name=".grpc.health.v1.HealthCheckResponse.ServingStatus",
        label=_Field.LABEL_OPTIONAL,
    )
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())
HealthCheckRequest = message_factory.GetMessageClass(_pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest"))
HealthCheckResponse = message_factory.GetMessageClass(_pool.FindMessageTypeByName("grpc.health.v1.HealthCheckResponse"))
SERVING = 1
