"""`rewardserve health`: exit code 0 if a server, or one model of it, serves (grpc.health.v1); for container probes."""

import contextlib
from collections.abc import Sequence

from pydantic import Field

from rewardserve.cli.running import MAX_TIMEOUT_S, check_port, guarded
from rewardserve.client import DeadlineExceeded, RewardClient, RewardClientError
from rewardserve.config import ServeConfig, load_config
from rewardserve.options import ConfigError, Options, load_options

EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and one of this machine
DESCRIBE_TIMEOUT_S = 1.0  # to say why


def beside() -> str:
    """The server of this container, as its environment, and the file that is named there, say it. Not flags of its."""
    try:
        config = load_config([])
    except ConfigError:  # that is for the server to say
        config = ServeConfig.model_construct()
    host = config.host.removeprefix("[").removesuffix("]")
    host = EVERY_ADDRESS.get(host, host)
    return f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"


class HealthOptions(Options):
    """Asks a server whether it serves."""

    endpoint: str = Field(default=beside(), description="server to ask; host:port")
    name: str = Field(default="", description="one model, by the name it is served by; the whole server if empty")
    timeout: float = Field(default=5.0, gt=0, le=MAX_TIMEOUT_S, description="seconds to wait for it to serve")


def run(arguments: Sequence[str]) -> int:
    return guarded("health", lambda: _health(load_options(HealthOptions, "health", arguments)))


def _health(options: HealthOptions) -> int:
    check_port(options.endpoint)
    try:
        client = RewardClient(options.endpoint, timeout=options.timeout)
    except ValueError as error:
        raise ConfigError(f"--endpoint: {error}") from None
    with client:
        try:
            client.wait_ready(options.timeout, options.name)
        except DeadlineExceeded as error:
            if failed := _failed(client, options.name):
                raise RewardClientError(failed) from error
            raise
    print("serving")
    return 0


def _failed(client: RewardClient, name: str) -> str:
    """What is known of a model that will not serve however long it is waited for; empty if there is none."""
    with contextlib.suppress(RewardClientError):
        for model in client.list_models(timeout=DESCRIBE_TIMEOUT_S):
            if model.state == "failed" and name in ("", model.name):
                return f"'{model.name}' has failed: {model.message}"
    return ""
