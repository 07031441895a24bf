"""Waiting groups -> the next forward, within a token budget. Integers and bytes only; loads no torch.

How a group goes into forwards is filling.py's. Where several models share the backbone a forward is of one of them;
they take turns, and find each other's prompts if their backbones compute the same.

Forwards run in the order they were scheduled, so a block may be given to new work as soon as the last forward that
reads it is *scheduled*: whoever writes it runs later. That is why everything a group holds is released when its last
chunk is scheduled. When a forward fails, it and all scheduled after it are rolled back as if they had never been.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

from rewardserve_kernels.ragged import BLOCK_TOKENS

from rewardserve.engine.base import EngineRequest, Outcome
from rewardserve.engine.native.fair_queue import FairQueue
from rewardserve.engine.native.filling import Filler, Filling, SharingFiller, WholeFiller
from rewardserve.engine.native.jobs import Jobs
from rewardserve.engine.native.prefix_cache import PrefixCache, block_keys
from rewardserve.engine.native.sequence import BatchPlan, Group, Sequence, Status
from rewardserve.engine.native.step_limit import StepLimit
from rewardserve.models.reads import Features, Reader, ReadPlan
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure


@dataclass(frozen=True, slots=True)
class _Lane:
    """One of the models that share the backbone."""

    variant: int
    queue: FairQueue[Group]
    reader: Reader
    key: bytes  # what keys of prompts begin with
    key_of_kept: bytes  # of prompts that features are kept of, which are the head's


class Scheduler:
    """Not thread-safe: its owner calls it under one lock."""

    def __init__(
        self,
        cache: PrefixCache | None,
        max_batch_tokens: int,
        max_batch_sequences: int,
        clock: Callable[[], float] = time.monotonic,
        readers: Sequence_[Reader] = (Reader(ReadPlan()),),
        trunks: Sequence_[int] = (0,),
    ) -> None:
        """Without a cache responses are planned whole, each with its prompt.

        Of each model that shares the backbone: where it is read, by default at each response's last token; and the
        number of the first one whose backbone computes the same.
        """
        self._filler: Filler = WholeFiller() if cache is None else SharingFiller(cache)
        self._limit = StepLimit(max_batch_tokens, least=BLOCK_TOKENS)
        self._max_chunks = max_batch_sequences
        self._lanes = [
            _Lane(variant, FairQueue(max_batch_tokens), reader, _key(trunk), _key(trunk, variant))
            for variant, (reader, trunk) in enumerate(zip(readers, trunks, strict=True))
        ]
        self._turn = 0  # whose forward is next, of those with the same priority
        self._blocked: Group | None = None  # waits for blocks that others hold
        self._jobs = Jobs(clock)
        self._outstanding: list[BatchPlan] = []  # scheduled, neither completed nor rolled back; oldest first

    # -- what comes in, what goes out ------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Its id must not be in flight already."""
        groups = [self._group(request, encoded) for encoded in request.groups]
        self._jobs.add(request, groups)
        for group in groups:
            if group.finished:  # none of its responses has anything to read
                self._jobs.finish_if_done(group)
            else:
                self._enqueue(group)

    def _group(self, request: EngineRequest, encoded: EncodedGroup) -> Group:
        lane = self._lanes[request.variant]
        group = Group.from_encoded(request.request_id, encoded, lane.reader, request.variant)
        group.client, group.priority = request.client, request.priority
        if self._filler.shares:
            group.find_kept(lane.reader)
            group.keys = list(block_keys(encoded.prompt, lane.key_of_kept if group.reads else lane.key))
        return group

    def cancel(self, request_id: str) -> None:
        """Drops what has not begun; unknown ids (already finished) are none of our business."""
        if request_id in self._jobs:
            self._drop(request_id, expired=False)

    def take_outcomes(self) -> list[Outcome]:
        """Requests that ended since the last call."""
        return self._jobs.take_outcomes()

    def requests(self) -> list[EngineRequest]:
        """All requests in flight, in the order they came."""
        return self._jobs.requests()

    def num_waiting_groups(self, variant: int = 0) -> int:
        return len(self._lanes[variant].queue)

    def num_waiting_requests(self, variant: int = 0) -> int:
        return len({group.request_id for group in self._lanes[variant].queue})

    def num_waiting_tokens(self, variant: int = 0) -> int:
        return sum(group.num_tokens_left for group in self._lanes[variant].queue)

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._outstanding

    # -- planning --------------------------------------------------------------------------------------------------

    def schedule(self) -> BatchPlan | None:
        """The next forward, or None if there is nothing to compute now."""
        for request_id in self._jobs.expired():
            self._drop(request_id, expired=True)
        for lane in self._in_turn():
            filling = self._fill(lane)
            self._filler.settle(filling)
            if filling.chunks:
                break
            self._note_blocked(lane)
        else:
            return None
        self._turn = lane.variant + 1
        moves = self._filler.take_moves()
        plan = BatchPlan(
            tuple(filling.chunks), tuple(filling.published), filling.num_cached_tokens, moves, lane.variant
        )
        self._outstanding.append(plan)
        return plan

    def _in_turn(self) -> list[_Lane]:
        """Those with something to compute: the highest priority first, then whose turn it is."""
        waiting = [(lane.queue.highest_priority, lane) for lane in self._lanes]
        order = [
            (-priority, (lane.variant - self._turn) % len(self._lanes), lane)
            for priority, lane in waiting
            if priority is not None
        ]
        return [lane for *_, lane in sorted(order, key=lambda entry: entry[:2])]

    def _fill(self, lane: _Lane) -> Filling:
        filling = Filling(self._limit.tokens, self._max_chunks)
        while not filling.full and (group := self._next_group(lane)) is not None and filling.admits(group):
            tokens_before = filling.tokens_left
            done = self._filler.serve(group, filling)
            lane.queue.charge(group, tokens_before - filling.tokens_left)
            group.charged_in = lane.queue.period
            if not done:
                break  # it did not fit: the next forward begins with what is fair then
            lane.queue.remove(group)
            self._filler.retire(group, filling)
        return filling

    def _next_group(self, lane: _Lane) -> Group | None:
        """What is fair next; but if there are no blocks to start it, what was started goes on to free some."""
        group = lane.queue.peek()
        if group is None or group.started or (not self._is_behind_another(group) and self._filler.start(group)):
            return group
        return next((started for started in self._filler.started if started.variant == lane.variant), None)

    def _note_blocked(self, lane: _Lane) -> None:
        """It was this one's turn, and there were no blocks to begin anything with."""
        group = lane.queue.peek()
        if group is not None and not group.started and not self._is_waiting(self._blocked):
            self._blocked = group

    def _is_waiting(self, blocked: Group | None) -> bool:
        return blocked is not None and not blocked.started and blocked in self._lanes[blocked.variant].queue

    def _is_behind_another(self, group: Group) -> bool:
        """Blocks that come free are for the one that waits for them, or another model would take them forever."""
        blocked = self._blocked
        if blocked is None or not self._is_waiting(blocked) or blocked.variant == group.variant:
            return False
        return group.priority <= blocked.priority

    # -- what became of it -----------------------------------------------------------------------------------------

    def begin(self, plan: BatchPlan) -> None:
        """The forward starts now: queueing ends for the requests in it."""
        self._jobs.begin(chunk.group.request_id for chunk in plan.chunks)

    def complete(self, plan: BatchPlan, features: Sequence_[Features]) -> None:
        """The oldest forward under way is done; `features` of all its chunks' reads, in their order."""
        assert self._outstanding and self._outstanding[0] is plan, "forwards complete in the order they were scheduled"
        self._outstanding.pop(0)
        self._limit.ended_well()
        assert len(features) == plan.num_reads
        computed = iter(features)
        for chunk in plan.chunks:
            for position in chunk.reads:
                kept = chunk.group.kept[position // BLOCK_TOKENS] if chunk.sequence is None else chunk.sequence.features
                kept[position] = next(computed)
        scored = [chunk for chunk in plan.chunks if chunk.scored]
        for chunk in scored:
            assert chunk.sequence is not None
            self._fold(chunk.group, chunk.sequence)
        for group in {id(chunk.group): chunk.group for chunk in scored}.values():
            self._jobs.finish_if_done(group)

    def _fold(self, group: Group, sequence: Sequence) -> None:
        """All of a sequence is computed."""
        sequence.status = Status.FINISHED
        if group.dropped:
            return
        reading = self._lanes[group.variant].reader.fold(group.features_of(sequence), sequence.named)
        if all(map(math.isfinite, (reading.score, *reading.attributes, *reading.steps))):
            sequence.reading = reading
        else:
            message = f"the model's score is {reading.score}, not a number"
            if math.isfinite(reading.score):
                message = "an attribute of the model is not a number"
            sequence.failure = ItemFailure(ItemCode.INTERNAL, message, is_of_the_score=True)
        sequence.features = {}

    def rollback(self) -> None:
        """The oldest forward under way failed: it and all scheduled after it have never been."""
        plans, self._outstanding = self._outstanding, []
        chunks = [chunk for plan in plans for chunk in plan.chunks]
        touched = {id(group): group for group in (*(chunk.group for chunk in chunks), *self._filler.started)}
        charged = Counter[int]()
        for chunk in chunks:
            charged[id(chunk.group)] += chunk.stop - chunk.start
        self._filler.undo(plans)
        for group in reversed(touched.values()):  # each goes before those of its client
            self._filler.leave(group)
            queue = self._lanes[group.variant].queue
            owed = charged[id(group)] if group.charged_in == queue.period else 0
            if not _in_flight(group):
                queue.refund(group.client, group.priority, owed)
                continue
            for sequence in group.sequences:
                if sequence.status is Status.RUNNING:
                    sequence.status = Status.WAITING
            group.num_cached = 0
            if group not in queue:
                self._enqueue(group)
            queue.give_back(group, owed, group.num_tokens_left)

    def split(self, plan: BatchPlan, out_of_memory: bool = False) -> bool:
        """After a rollback: the groups in `plan` go in smaller forwards from now on. What was computed of them
        is gone, and if they grew again they would come to the same failure. False if there are no smaller ones.

        `out_of_memory`: so must all others, for a while; unless it was smaller than others already.
        """
        if len(plan.chunks) == 1 and (plan.num_tokens <= BLOCK_TOKENS or not self._filler.shares):
            return False
        if out_of_memory and not any(chunk.group.is_narrowed for chunk in plan.chunks):
            self._limit.ran_out(plan.num_tokens)
        for chunk in plan.chunks:
            group = chunk.group
            group.max_tokens = min(group.max_tokens, max(BLOCK_TOKENS, plan.num_tokens // 2))
            group.max_chunks = min(group.max_chunks, max(1, len(plan.chunks) // 2))
        return True

    def fail(self, plan: BatchPlan, failure: ItemFailure) -> None:
        """After a rollback: what `plan` was about gets `failure` instead of a score."""
        if failure.code is ItemCode.RESOURCE_EXHAUSTED:
            self._limit.was_not_it()
        for chunk in plan.chunks:
            group = chunk.group
            group.max_tokens = group.max_chunks = sys.maxsize  # what made it fail is found
            if not _in_flight(group):
                continue
            for sequence in group.waiting if chunk.sequence is None else [chunk.sequence]:
                if sequence.status is Status.WAITING:
                    sequence.status, sequence.failure = Status.FINISHED, failure
            if not group.waiting:
                self._remove(group)
                self._jobs.finish_if_done(group)

    def _enqueue(self, group: Group) -> None:
        self._lanes[group.variant].queue.add(group, group.client, group.num_tokens_left, group.priority)

    def _remove(self, group: Group) -> None:
        """Takes a group out of the queue, planned or not, and frees what it holds."""
        queue = self._lanes[group.variant].queue
        if group in queue:
            queue.remove(group)
        self._filler.leave(group)

    def _drop(self, request_id: str, expired: bool) -> None:
        for group in self._jobs.drop(request_id, expired):
            self._remove(group)

    def forget_prompts(self) -> None:
        """What is cached was made by other weights. Nothing may be under way."""
        assert not self._outstanding
        self._filler.forget_prompts()

    # -- integrity -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Asserts what must hold between calls: every block accounted for, every group where it belongs."""
        queued = [group for lane in self._lanes for group in lane.queue]
        in_queue = {id(group) for group in queued}
        for group in self._jobs.check():
            assert bool(group.waiting) == (id(group) in in_queue), "a group waits outside the queue, or in vain"
        assert all(group.request_id in self._jobs for group in queued), "a dropped group is queued"
        assert all(id(group) in in_queue for group in self._filler.started)
        self._filler.check()


def _in_flight(group: Group) -> bool:
    return not group.dropped and not group.finished


def _key(trunk: int, variant: int | None = None) -> bytes:
    """Of the only model there is, what keys begin with is nothing."""
    own = b"" if variant is None or variant == trunk else b"%d of " % variant
    return own + (b"" if trunk == 0 else b"%d" % trunk)
