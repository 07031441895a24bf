"""`rewardserve health`: exit code 0 if a server, or one model of it, serves (grpc.health.v1); for container probes."""

from collections.abc import Sequence

from pydantic import Field

from rewardserve.cli.running import MAX_TIMEOUT_S, guarded
from rewardserve.client import RewardClient
from rewardserve.config import ServeConfig
from rewardserve.options import PREFIX, ConfigError, Options, load_options, own_variables

PORT = own_variables().get(f"{PREFIX}PORT", ServeConfig.model_fields["port"].default)  # of the server beside the probe


class HealthOptions(Options):
    """Asks a server whether it serves."""

    endpoint: str = Field(default=f"127.0.0.1:{PORT}", description="server to ask; host:port")
    name: str = Field(default="", description="one model, by the name it is served by; the whole server if empty")
    timeout: float = Field(default=5.0, gt=0, le=MAX_TIMEOUT_S, description="seconds to wait for it to serve")


def run(arguments: Sequence[str]) -> int:
    return guarded("health", lambda: _health(load_options(HealthOptions, "health", arguments)))


def _health(options: HealthOptions) -> int:
    try:
        client = RewardClient(options.endpoint, timeout=options.timeout)
    except ValueError as error:
        raise ConfigError(f"--endpoint: {error}") from None
    with client:
        client.wait_ready(options.timeout, options.name)
    print("serving")
    return 0
