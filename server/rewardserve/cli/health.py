"""`rewardserve health`: exit code 0 if a server, or one model of it, serves (grpc.health.v1); for container probes."""

import os
import sys
from collections.abc import Sequence

from pydantic import Field

from rewardserve.client import RewardClient, RewardClientError
from rewardserve.options import PREFIX, ConfigError, Options, load_options


class HealthOptions(Options):
    """Asks a server whether it serves."""

    endpoint: str = Field(
        default=f"127.0.0.1:{os.environ.get(f'{PREFIX}PORT', '50051')}", description="server to ask; host:port"
    )
    name: str = Field(default="", description="one model, by the name it is served by; the whole server if empty")
    timeout: float = Field(default=5.0, gt=0, description="seconds to wait for it to serve")


def run(arguments: Sequence[str]) -> int:
    try:
        options = load_options(HealthOptions, "health", arguments)
    except ConfigError as error:
        print(f"rewardserve health: {error}", file=sys.stderr)
        return 2
    with RewardClient(options.endpoint, timeout=options.timeout) as client:
        try:
            client.wait_ready(options.timeout, options.name)
        except RewardClientError as error:
            print(f"rewardserve health: {error}", file=sys.stderr)
            return 1
    print("serving")
    return 0
