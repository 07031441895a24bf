"""All that crosses between the front and an engine's process."""

import msgspec

from rewardserve.engine.base import BatchReport, EngineInfo, EngineRequest, EngineResult

POISONED_EXIT = 70  # exit code of an engine whose device cannot go on


class Score(msgspec.Struct, tag=True, frozen=True):
    request: EngineRequest


class Cancel(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class UpdateWeights(msgspec.Struct, tag=True, frozen=True):
    source: str


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Answered between two forwards: a process whose device hangs takes work and gives it up, and computes nothing."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    pass


class Loading(msgspec.Struct, tag=True, frozen=True):
    """Said every few seconds, so that a load that takes its time is told from one that hangs."""


class Pong(msgspec.Struct, tag=True, frozen=True):
    pass


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class CannotLoad(msgspec.Struct, tag=True, frozen=True):
    reason: str
    of_options: bool  # whether it is they that do not fit, on this device: OptionsDoNotFit


class Done(msgspec.Struct, tag=True, frozen=True):
    request_id: str
    result: EngineResult | None
    expired: bool


class Updated(msgspec.Struct, tag=True, frozen=True):
    """What is loaded now, or why nothing has changed."""

    info: EngineInfo | None
    reason: str


class Batch(msgspec.Struct, tag=True, frozen=True):
    report: BatchReport


ToChild = Score | Cancel | UpdateWeights | Ping | Stop
ToParent = Loading | Pong | Ready | CannotLoad | Done | Updated | Batch
