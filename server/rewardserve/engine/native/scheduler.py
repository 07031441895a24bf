"""Waiting groups -> the next forward, within a token budget. Integers and bytes only; loads no torch.

A group's prompt is computed once, from the first block the prefix cache does not have; its responses follow, as many as
the budget holds, each whole unless it is longer than a whole forward. Where several models share the backbone a forward
is of one of them; they take turns, and find each other's prompts if their backbones compute the same.

Forwards run in the order they were scheduled, so a block may be given to new work as soon as the last forward that
reads it is *scheduled*: whoever writes it runs later. That is why everything a group holds is released when its last
chunk is scheduled. When a forward fails, it and all scheduled after it are rolled back as if they had never been.
"""

import heapq
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from rewardserve_kernels.ragged import BLOCK_TOKENS, ceil_block, floor_block

from rewardserve.engine.base import EngineGroup, EngineItem, EngineRequest, EngineResult, Outcome
from rewardserve.engine.native.fair_queue import FairQueue
from rewardserve.engine.native.prefix_cache import PrefixCache, block_keys
from rewardserve.engine.native.sequence import BatchPlan, Chunk, Group, Sequence, Status
from rewardserve.engine.native.step_limit import StepLimit
from rewardserve.models.reads import Features, Reader, ReadPlan
from rewardserve.types import EncodedGroup, ItemCode, ItemFailure

DEADLINES_KEPT = 1024  # of requests that have ended, at least, before they are looked through


@dataclass(slots=True, eq=False)
class _Job:
    request: EngineRequest
    groups: list[Group]
    received_at: float
    started_at: float | None = None
    num_unfinished: int = 0  # groups


@dataclass(frozen=True, slots=True)
class _Lane:
    """One of the models that share the backbone."""

    variant: int
    queue: FairQueue[Group]
    reader: Reader
    key: bytes  # what keys of prompts begin with
    key_of_kept: bytes  # of prompts that features are kept of, which are the head's


@dataclass(slots=True)
class _Filling:
    """A forward being filled, and what is left of its budget."""

    max_tokens: int
    max_chunks: int
    tokens_left: int = field(init=False)
    chunks_left: int = field(init=False)
    chunks: list[Chunk] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    to_release: list[int] = field(default_factory=list)  # once the forward is planned
    num_cached_tokens: int = 0
    to_reserve: list[tuple[Group, int]] = field(default_factory=list)  # again, once those are released

    def __post_init__(self) -> None:
        self.tokens_left, self.chunks_left = self.max_tokens, self.max_chunks

    @property
    def full(self) -> bool:
        return self.tokens_left <= 0 or self.chunks_left <= 0

    def admits(self, group: Group) -> bool:
        """Whether the forward is, or can still be made, as small as the group's must be."""
        if not self.chunks:
            self.max_tokens = min(self.max_tokens, group.max_tokens)
            self.max_chunks = min(self.max_chunks, group.max_chunks)
            self.tokens_left, self.chunks_left = self.max_tokens, self.max_chunks
        return self.max_tokens <= group.max_tokens and self.max_chunks <= group.max_chunks

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.tokens_left -= chunk.stop - chunk.start
        self.chunks_left -= 1


class Scheduler:
    """Not thread-safe: its owner calls it under one lock.

    Without a prefix cache nothing is shared or cut: every response is planned whole, together with its prompt.
    """

    def __init__(
        self,
        cache: PrefixCache | None,
        max_batch_tokens: int,
        max_batch_sequences: int,
        clock: Callable[[], float] = time.monotonic,
        readers: Sequence_[Reader] = (Reader(ReadPlan()),),
        trunks: Sequence_[int] = (0,),
    ) -> None:
        """Of each model that shares the backbone: where it is read, by default at each response's last token; and the
        number of the first one whose backbone computes the same.
        """
        self._cache = cache
        self._limit = StepLimit(max_batch_tokens, least=BLOCK_TOKENS)
        self._max_chunks = max_batch_sequences
        self._clock = clock
        self._lanes = [
            _Lane(variant, FairQueue(max_batch_tokens), reader, _key(trunk), _key(trunk, variant))
            for variant, (reader, trunk) in enumerate(zip(readers, trunks, strict=True))
        ]
        self._turn = 0  # whose forward is next, of those with the same priority
        self._blocked: Group | None = None  # waits for blocks that others hold
        self._jobs: dict[str, _Job] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._started: dict[int, Group] = {}  # by id: in the queue, holding or reserving blocks
        self._reserved = 0
        self._outstanding: list[BatchPlan] = []  # scheduled, neither completed nor rolled back; oldest first
        self._outcomes: list[Outcome] = []

    # -- what comes in, what goes out ------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Its id must not be in flight already."""
        assert request.request_id not in self._jobs
        groups = [self._group(request, encoded) for encoded in request.groups]
        job = _Job(request, groups, self._clock(), num_unfinished=len(groups))
        self._jobs[request.request_id] = job
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
            if len(self._deadlines) > 2 * len(self._jobs) + DEADLINES_KEPT:
                self._forget_deadlines()
        for group in groups:
            if group.finished:  # none of its responses has anything to read
                self._finish_if_done(group)
            else:
                self._enqueue(group)

    def _group(self, request: EngineRequest, encoded: EncodedGroup) -> Group:
        lane = self._lanes[request.variant]
        group = Group.from_encoded(request.request_id, encoded, lane.reader, request.variant)
        if self._cache is not None:
            group.find_kept(lane.reader)
            group.keys = list(block_keys(encoded.prompt, lane.key_of_kept if group.reads else lane.key))
        return group

    def cancel(self, request_id: str) -> None:
        """Drops what has not begun; unknown ids (already finished) are none of our business."""
        if request_id in self._jobs:
            self._drop(request_id, expired=False)

    def take_outcomes(self) -> list[Outcome]:
        """Requests that ended since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def requests(self) -> list[EngineRequest]:
        """All requests in flight, in the order they came."""
        return [job.request for job in self._jobs.values()]

    def _waiting_groups(self) -> Iterator[Group]:
        return itertools.chain.from_iterable(lane.queue for lane in self._lanes)

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
        self._drop_expired()
        for lane in self._in_turn():
            filling = self._fill(lane)
            self._settle(filling)
            if filling.chunks:
                break
            self._note_blocked(lane)
        else:
            return None
        self._turn = lane.variant + 1
        moves = self._cache.take_moves() if self._cache is not None else ()
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

    def _fill(self, lane: _Lane) -> _Filling:
        filling = _Filling(self._limit.tokens, self._max_chunks)
        while not filling.full and (group := self._next_group(lane)) is not None and filling.admits(group):
            tokens_before = filling.tokens_left
            done = self._serve(group, filling)
            lane.queue.charge(group, tokens_before - filling.tokens_left)
            if not done:
                break  # it did not fit: the next forward begins with what is fair then
            self._retire(group, filling)
        return filling

    def _settle(self, filling: _Filling) -> None:
        """The forward is planned: what it read last may be written by the next."""
        if self._cache is None:
            return
        self._cache.release(filling.to_release)
        for group, num_blocks in filling.to_reserve:
            if group.started:
                group.num_reserved += num_blocks
                self._reserved += num_blocks

    def _next_group(self, lane: _Lane) -> Group | None:
        """What is fair next; but if there are no blocks to start it, what was started goes on to free some."""
        group = lane.queue.peek()
        if group is None or group.started or self._start(group):
            return group
        return next((started for started in self._started.values() if started.variant == lane.variant), None)

    def _start(self, group: Group) -> bool:
        """Reserves the blocks the group needs at worst, so that groups under way can never block one another."""
        if self._cache is None:
            group.started = True
            return True
        if self._is_behind_another(group):
            return False
        need = _blocks_needed(group)
        if self._cache.num_available - self._reserved < need:
            assert self._started or self._cache.num_available < self._cache.pool.num_blocks, (
                "pool too small for a group"
            )
            return False
        group.started, group.num_reserved, group.kept = True, need, {}
        self._reserved += need
        self._started[id(group)] = group
        return True

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
        return self._priority(group) <= self._priority(blocked)

    def _priority(self, group: Group) -> int:
        return self._jobs[group.request_id].request.priority

    def _serve(self, group: Group, filling: _Filling) -> bool:
        """Plans what fits of a started group. True if all of it is planned."""
        if self._cache is None:
            return self._serve_whole(group, filling)
        self._serve_prompt(group, self._cache, filling)
        if group.num_computed < group.prompt_length:
            return False
        for sequence in group.waiting:
            if filling.full or not self._serve_response(group, sequence, self._cache, filling):
                return False
        return True

    def _serve_whole(self, group: Group, filling: _Filling) -> bool:
        for sequence in group.waiting:
            tokens = group.prompt + sequence.tokens
            length = len(tokens) // 4
            if filling.full or (length > filling.tokens_left and filling.chunks):
                return False
            filling.add(Chunk(group, sequence, tokens, 0, length, (), store=False, scored=True, reads=sequence.reads))
            sequence.status = Status.RUNNING
        return True

    def _serve_prompt(self, group: Group, cache: PrefixCache, filling: _Filling) -> None:
        length = group.prompt_length
        while group.num_computed < length:
            start = group.num_computed
            if start % BLOCK_TOKENS == 0:
                key, end = group.keys[start // BLOCK_TOKENS], min(length, start + BLOCK_TOKENS)
                block = cache.acquire(key, group.reads_between(start, end))
                if block is not None:
                    self._give(group, group.blocks, block)
                    group.kept[start // BLOCK_TOKENS] = cache.kept(key)
                    group.num_computed = end
                    group.num_cached += group.num_computed - start
                    filling.num_cached_tokens += group.num_computed - start
                    continue
            if filling.full:
                return
            stop = _chunk_stop(start, length, filling.tokens_left)
            self._extend(group, group.blocks, math.ceil(stop / BLOCK_TOKENS), cache)
            tokens, reads = group.prompt[4 * start : 4 * stop], self._prompt_reads(group, start, stop, cache)
            for position in reads:
                group.kept.setdefault(position // BLOCK_TOKENS, {})[position] = None
            filling.add(Chunk(group, None, tokens, start, stop, tuple(group.blocks), True, scored=False, reads=reads))
            group.num_computed = stop
            whole = len(group.blocks) if stop == length else stop // BLOCK_TOKENS
            for index in range(start // BLOCK_TOKENS, whole):
                if cache.publish(group.keys[index], group.blocks[index], group.kept.get(index)):
                    filling.published.append(group.blocks[index])

    def _prompt_reads(self, group: Group, start: int, stop: int, cache: PrefixCache) -> tuple[int, ...]:
        """Those of the group, and those that others wanted of the same blocks: so that what is kept only grows."""
        reads = group.reads_between(start, stop)
        if not reads:
            return ()
        wanted = set(reads)
        for index in range(start // BLOCK_TOKENS, math.ceil(stop / BLOCK_TOKENS)):
            wanted.update(position for position in cache.kept(group.keys[index]) if start <= position < stop)
        return tuple(sorted(wanted))

    def _serve_response(self, group: Group, sequence: Sequence, cache: PrefixCache, filling: _Filling) -> bool:
        """True if the response's last token is planned."""
        start, stop = group.prompt_length, group.prompt_length + sequence.num_tokens
        if sequence.num_computed is None and sequence.num_tokens <= filling.max_tokens:
            if sequence.num_tokens > filling.tokens_left:
                return False
            reads = tuple(position for position in sequence.reads if position >= start)
            blocks = tuple(group.blocks)
            filling.add(Chunk(group, sequence, sequence.tokens, start, stop, blocks, False, scored=True, reads=reads))
            sequence.status = Status.RUNNING
            return True
        return self._serve_long_response(group, sequence, cache, filling, stop)

    def _serve_long_response(
        self, group: Group, sequence: Sequence, cache: PrefixCache, filling: _Filling, end: int
    ) -> bool:
        """One chunk of a response that no single forward holds."""
        start = floor_block(group.prompt_length) if sequence.num_computed is None else sequence.num_computed
        stop = _chunk_stop(start, end, filling.tokens_left)
        last = stop == end
        shared = group.blocks[: group.num_whole_blocks]
        if not last:
            num_own = math.ceil(stop / BLOCK_TOKENS) - len(shared)
            if not self._extend(group, sequence.own_blocks, num_own, cache):
                return False  # a sibling's blocks come free when this forward is planned
        tokens = (group.prompt + sequence.tokens)[4 * start : 4 * stop]
        blocks = (*shared, *sequence.own_blocks)
        begin = max(start, group.prompt_length)
        reads = tuple(position for position in sequence.reads if begin <= position < stop)
        filling.add(Chunk(group, sequence, tokens, start, stop, blocks, store=not last, scored=last, reads=reads))
        sequence.num_computed = stop
        if last:
            sequence.status = Status.RUNNING
            self._take_back(group, sequence, filling)
        return last

    def _extend(self, group: Group, blocks: list[int], length: int, cache: PrefixCache) -> bool:
        """Allocates until `blocks` has `length` of them. False if that is not possible now (long siblings only)."""
        while len(blocks) < length and group.num_reserved:
            block = cache.allocate()
            assert block is not None, "reserved blocks are always available"
            self._give(group, blocks, block)
        return len(blocks) == length

    def _give(self, group: Group, blocks: list[int], block: int) -> None:
        blocks.append(block)
        group.num_reserved -= 1
        self._reserved -= 1

    def _take_back(self, group: Group, sequence: Sequence, filling: _Filling) -> None:
        """A long response is planned whole: its blocks become free, and the next one may use as many."""
        filling.to_release += sequence.own_blocks
        filling.to_reserve.append((group, len(sequence.own_blocks)))
        sequence.own_blocks = []

    def _retire(self, group: Group, filling: _Filling) -> None:
        """All of a group is planned."""
        self._lanes[group.variant].queue.remove(group)
        filling.to_release += self._leave_started(group)

    def _leave_started(self, group: Group) -> list[int]:
        """Ends the group's hold on blocks; returns those it held."""
        held = group.blocks + [block for s in group.sequences for block in s.own_blocks]
        self._started.pop(id(group), None)
        self._reserved -= group.num_reserved
        group.blocks, group.num_computed, group.num_reserved, group.started = [], 0, 0, False
        for sequence in group.sequences:
            sequence.own_blocks, sequence.num_computed = [], None
        return held

    # -- what became of it -----------------------------------------------------------------------------------------

    def begin(self, plan: BatchPlan) -> None:
        """The forward starts now: queueing ends for the requests in it."""
        now = self._clock()
        for chunk in plan.chunks:
            job = self._jobs.get(chunk.group.request_id)
            if job is not None and job.started_at is None:
                job.started_at = now

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
            self._finish_if_done(group)

    def _fold(self, group: Group, sequence: Sequence) -> None:
        """All of a sequence is computed."""
        sequence.status = Status.FINISHED
        if group.dropped:
            return
        features = group.features_of(sequence) if self._cache else list(sequence.features.values())
        reading = self._lanes[group.variant].reader.fold(features, sequence.named)
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
        touched = {id(chunk.group): chunk.group for plan in plans for chunk in plan.chunks}
        touched.update(self._started)
        charged = Counter[int]()
        for chunk in (chunk for plan in plans for chunk in plan.chunks):
            charged[id(chunk.group)] += chunk.stop - chunk.start
        if self._cache is not None:
            for block in {block for plan in plans for block in plan.published}:
                self._cache.retract(block)
            self._cache.undo(move for plan in plans for move in plan.moves)
        for group in reversed(touched.values()):  # each goes before those of its client
            if self._cache is not None:
                self._cache.release(self._leave_started(group))
            if not self._in_flight(group):
                continue
            for sequence in group.sequences:
                if sequence.status is Status.RUNNING:
                    sequence.status = Status.WAITING
            group.num_cached = 0
            queue = self._lanes[group.variant].queue
            if group not in queue:
                self._enqueue(group)
            queue.give_back(group, charged[id(group)], group.num_tokens_left)

    def split(self, plan: BatchPlan, out_of_memory: bool = False) -> bool:
        """After a rollback: the groups in `plan` go in smaller forwards from now on. What was computed of them
        is gone, and if they grew again they would come to the same failure. False if there are no smaller ones.

        `out_of_memory`: so must all others, for a while; unless it was smaller than others already.
        """
        if len(plan.chunks) == 1 and (plan.num_tokens <= BLOCK_TOKENS or self._cache is None):
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
            if not self._in_flight(group):
                continue
            for sequence in group.waiting if chunk.sequence is None else [chunk.sequence]:
                if sequence.status is Status.WAITING:
                    sequence.status, sequence.failure = Status.FINISHED, failure
            if not group.waiting:
                self._remove(group)
                self._finish_if_done(group)

    def _in_flight(self, group: Group) -> bool:
        return not group.dropped and not group.finished

    def _finish_if_done(self, group: Group) -> None:
        if group.dropped or not group.finished:
            return
        job = self._jobs[group.request_id]
        job.num_unfinished -= 1
        if job.num_unfinished == 0:
            del self._jobs[group.request_id]
            self._outcomes.append(Outcome(group.request_id, self._result(job)))

    def _result(self, job: _Job) -> EngineResult:
        started = job.received_at if job.started_at is None else job.started_at
        groups = tuple(
            EngineGroup(tuple(_item(sequence) for sequence in group.sequences), group.num_cached)
            for group in job.groups
        )
        return EngineResult(groups, queue_s=started - job.received_at, compute_s=self._clock() - started)

    def _enqueue(self, group: Group) -> None:
        request = self._jobs[group.request_id].request
        self._lanes[group.variant].queue.add(group, request.client, group.num_tokens_left, request.priority)

    def _remove(self, group: Group) -> None:
        """Takes a group out of the queue, planned or not, and frees what it holds."""
        queue = self._lanes[group.variant].queue
        if group in queue:
            queue.remove(group)
        if self._cache is not None:
            self._cache.release(self._leave_started(group))

    def _drop(self, request_id: str, expired: bool) -> None:
        job = self._jobs.pop(request_id)
        for group in job.groups:
            group.dropped = True
            self._remove(group)
        self._outcomes.append(Outcome(request_id, None, expired))

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            job = self._jobs.get(request_id)
            if job is not None and job.request.deadline is not None and job.request.deadline <= now:
                self._drop(request_id, expired=True)

    def _forget_deadlines(self) -> None:
        """Of requests that have ended: those that are given hours would be remembered for hours."""
        requests = [job.request for job in self._jobs.values()]
        self._deadlines = [(r.deadline, r.request_id) for r in requests if r.deadline is not None]
        heapq.heapify(self._deadlines)

    def forget_prompts(self) -> None:
        """What is cached was made by other weights. Nothing may be under way."""
        assert not self._outstanding
        if self._cache is not None:
            self._cache.clear()

    # -- integrity -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Asserts what must hold between calls: every block accounted for, every group where it belongs."""
        in_queue = {id(group) for group in self._waiting_groups()}
        for request_id, job in self._jobs.items():
            assert job.num_unfinished == sum(not group.finished for group in job.groups) > 0, request_id
            for group in job.groups:
                assert bool(group.waiting) == (id(group) in in_queue), "a group waits outside the queue, or in vain"
        assert all(group.request_id in self._jobs for group in self._waiting_groups()), "a dropped group is queued"
        assert all(key in in_queue for key in self._started)
        if self._cache is None:
            return
        self._cache.check()
        holds: dict[int, int] = {}
        for group in self._started.values():
            for block in group.blocks + [b for s in group.sequences for b in s.own_blocks]:
                holds[block] = holds.get(block, 0) + 1
        for block in range(self._cache.pool.num_blocks):
            assert self._cache.pool.references(block) == holds.get(block, 0), f"block {block} is held by nobody known"
        assert self._reserved == sum(group.num_reserved for group in self._started.values())
        assert self._cache.num_available >= self._reserved >= 0, "more is reserved than there is"


def _item(sequence: Sequence) -> EngineItem:
    reading = sequence.reading
    if reading is None:
        return EngineItem(None, sequence.failure)
    return EngineItem(reading.score, None, reading.attributes, reading.steps, reading.std)


def _key(trunk: int, variant: int | None = None) -> bytes:
    """Of the only model there is, what keys begin with is nothing."""
    own = b"" if variant is None or variant == trunk else b"%d of " % variant
    return own + (b"" if trunk == 0 else b"%d" % trunk)


def _blocks_needed(group: Group) -> int:
    """Blocks a group may hold at once: its prompt's, and those of its longest response, should that go in chunks."""
    longest = max(sequence.num_tokens for sequence in group.sequences)
    own = ceil_block(group.prompt_length + longest) // BLOCK_TOKENS - group.num_whole_blocks
    return math.ceil(group.prompt_length / BLOCK_TOKENS) + own


def _chunk_stop(start: int, end: int, tokens_left: int) -> int:
    """Where a chunk that begins at `start` stops: at the end, else at a block's border if one is in reach."""
    stop = start + tokens_left
    if stop >= end:
        return end
    return floor_block(stop) if floor_block(stop) > start else stop
