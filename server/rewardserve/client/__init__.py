"""The client of rewardserve. Needs grpcio and protobuf; never torch, never numpy.

from rewardserve.client import Group, RewardClient

with RewardClient("localhost:50051") as client:
    result = client.score([Group("What is 2 + 2?", ["4", "5"])])
    print(result.groups[0].scores)
"""

from rewardserve.client.aio import AsyncRewardClient
from rewardserve.client.blocking import RewardClient
from rewardserve.client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ItemFailed,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    RewardClientError,
    ServerError,
    Unavailable,
    VersionMismatch,
)
from rewardserve.client.retry import RetryPolicy
from rewardserve.client.token_ids import TokenIds
from rewardserve.client.types import (
    CanaryPair,
    ChatMessage,
    CompareResult,
    Group,
    GroupScore,
    ItemScore,
    ModelInfo,
    RankedResponse,
    RankResult,
    Rendered,
    ScoreResult,
    Status,
    StepOptions,
    Steps,
    SwapResult,
    Timings,
)

__all__ = [
    "AsyncRewardClient",
    "CanaryPair",
    "ChatMessage",
    "CompareResult",
    "DeadlineExceeded",
    "Group",
    "GroupScore",
    "InvalidRequest",
    "ItemFailed",
    "ItemScore",
    "ModelInfo",
    "ModelNotFound",
    "Overloaded",
    "PermissionDenied",
    "RankResult",
    "RankedResponse",
    "Rendered",
    "RetryPolicy",
    "RewardClient",
    "RewardClientError",
    "ScoreResult",
    "ServerError",
    "Status",
    "StepOptions",
    "Steps",
    "SwapResult",
    "Timings",
    "TokenIds",
    "Unavailable",
    "VersionMismatch",
]
