"""What users import is what is declared, and it costs them neither torch nor numpy."""

import inspect
import subprocess
import sys

import pytest
import rewardserve.client as client
from rewardserve.client import AsyncRewardClient, RewardClient


def test_every_exported_name_exists_and_every_public_class_is_exported():
    assert client.__all__ == sorted(client.__all__)
    public = {name for name, value in vars(client).items() if inspect.isclass(value)}
    assert public == set(client.__all__)


def test_importing_the_client_loads_neither_torch_nor_numpy():
    heavy = "('torch', 'numpy', 'pydantic', 'transformers')"
    code = f"import sys, rewardserve.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def public_methods(cls: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


def test_both_clients_have_the_same_methods():
    # open_stream is the door through which the blocking client drives a stream
    assert public_methods(AsyncRewardClient) - {"open_stream"} == public_methods(RewardClient)


@pytest.mark.parametrize("name", ["__init__", *sorted(public_methods(RewardClient))])
def test_both_clients_take_the_same_parameters(name):
    def parameters(cls: type) -> list[tuple]:
        found = inspect.signature(getattr(cls, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    assert parameters(RewardClient) == parameters(AsyncRewardClient)


def test_the_health_messages_live_beside_the_real_ones():
    real = pytest.importorskip("grpc_health.v1.health_pb2")
    from rewardserve.client import health

    sent = health.HealthCheckRequest(service="rewardserve.v1.Scoring/toy").SerializeToString()
    assert real.HealthCheckRequest.FromString(sent).service == health.service_name("toy")
    reply = real.HealthCheckResponse(status=real.HealthCheckResponse.SERVING).SerializeToString()
    assert health.HealthCheckResponse.FromString(reply).status == health.SERVING
