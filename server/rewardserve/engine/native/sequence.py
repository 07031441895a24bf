"""What the scheduler moves: a group under way, its sequences, and the plan of one forward. Loads no torch."""

import enum
import sys
from bisect import bisect_left
from dataclasses import dataclass, field

from rewardserve_kernels.ragged import BLOCK_TOKENS

from rewardserve.models.reads import Features, NothingToRead, Reader, Reading
from rewardserve.types import EncodedGroup, ItemFailure

Kept = dict[int, Features | None]  # by absolute position; None until the forward that computes it is done


class Status(enum.Enum):
    WAITING = "waiting"  # not scheduled, or only in part
    RUNNING = "running"  # its last token is in a plan
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One response to a group's prompt being scored."""

    index: int  # in the group
    tokens: bytes  # little-endian int32
    status: Status = Status.WAITING
    # A response too long for one forward goes in chunks, and keeps what it computed in blocks of its own. It starts at
    # the prompt's last whole block, so that its blocks are full from the first slot on.
    own_blocks: list[int] = field(default_factory=list)
    num_computed: int | None = None  # absolute position reached; None until the first chunk is scheduled
    reads: tuple[int, ...] = ()  # absolute positions whose features make the score
    named: bool = False  # by the request, not by the model
    features: dict[int, Features] = field(default_factory=dict)  # of positions in the response
    reading: Reading | None = None
    failure: ItemFailure | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4


@dataclass(slots=True, eq=False)
class Group:
    """One prompt with its responses, on its way through the scheduler."""

    request_id: str
    prompt: bytes
    sequences: list[Sequence]
    variant: int  # of those models that share the backbone
    client: str = ""  # who pays for it, and at which priority, even once its request is forgotten
    priority: int = 0
    keys: list[bytes] = field(default_factory=list)  # of the prompt's blocks, where there is a cache
    reads: list[int] = field(default_factory=list)  # positions in the prompt whose features are kept, ascending
    kept: dict[int, Kept] = field(default_factory=dict)  # those features, by block
    blocks: list[int] = field(default_factory=list)  # held; the first `num_computed` prompt tokens lie in them
    num_computed: int = 0
    num_cached: int = 0
    num_reserved: int = 0  # blocks it may still allocate; kept free for it, so that a started group can always finish
    started: bool = False
    max_tokens: int = sys.maxsize  # of a forward that it is part of: smaller after one that failed
    max_chunks: int = sys.maxsize
    charged_in: int = 0  # the period of its queue in which its client was charged for it
    dropped: bool = False  # its request expired or was cancelled; forwards under way may still hold its chunks

    @property
    def is_narrowed(self) -> bool:
        return self.max_tokens < sys.maxsize

    @classmethod
    def from_encoded(cls, request_id: str, encoded: EncodedGroup, reader: Reader, variant: int) -> "Group":
        sequences = [Sequence(index, tokens) for index, tokens in enumerate(encoded.responses)]
        for sequence, named in zip(sequences, encoded.steps or [()] * len(sequences), strict=True):
            try:
                sequence.reads = reader.positions(encoded.prompt, sequence.tokens, named)
            except NothingToRead as error:
                sequence.status, sequence.failure = Status.FINISHED, error.failure
            sequence.named = bool(named)
        return cls(request_id, encoded.prompt, sequences, variant)

    def find_kept(self, reader: Reader) -> None:
        """What of the prompt is read: what its blocks keep anyway, and what the sequences name."""
        length, found = self.prompt_length, set()
        if not reader.is_plain:
            found.update(reader.kept_in_prompt(self.prompt, BLOCK_TOKENS))
        for sequence in self.sequences:
            if sequence.reads and sequence.reads[0] < length:
                found.update(position for position in sequence.reads if position < length)
        self.reads = sorted(found)

    def reads_between(self, start: int, stop: int) -> tuple[int, ...]:
        """Those of the prompt in [start, stop)."""
        if not self.reads:
            return ()
        return tuple(self.reads[bisect_left(self.reads, start) : bisect_left(self.reads, stop)])

    def features_of(self, sequence: Sequence) -> list[Features]:
        """In the order of its reads, once all are there: its own, and what the prompt's blocks keep."""
        found = []
        for position in sequence.reads:
            own = position in sequence.features
            features = sequence.features[position] if own else self.kept[position // BLOCK_TOKENS][position]
            assert features is not None, "a forward before this one has computed it"
            found.append(features)
        return found

    @property
    def prompt_length(self) -> int:
        return len(self.prompt) // 4

    @property
    def num_whole_blocks(self) -> int:
        """Blocks of the prompt that are full."""
        return self.prompt_length // BLOCK_TOKENS

    @property
    def num_tokens_left(self) -> int:
        """Tokens still to be planned, if no more of the prompt is found in the cache."""
        return self.prompt_length - self.num_computed + sum(s.num_tokens for s in self.waiting)

    @property
    def waiting(self) -> list[Sequence]:
        return [s for s in self.sequences if s.status is Status.WAITING]

    @property
    def finished(self) -> bool:
        return all(s.status is Status.FINISHED for s in self.sequences)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, stop) of one sequence in a forward: of the prompt, or of prompt + response."""

    group: Group
    sequence: Sequence | None  # None: of the prompt itself
    tokens: bytes  # the token ids of these positions
    start: int
    stop: int
    blocks: tuple[int, ...]  # what lies before `start`; with `store` reaches to `stop`
    store: bool
    scored: bool  # the last position is the sequence's last
    reads: tuple[int, ...]  # positions of these whose features are wanted


@dataclass(frozen=True, slots=True)
class Move:
    """One block's contents between the pool and a slot in host memory."""

    key: bytes  # of the prompt's beginning that ends in it
    block: int
    slot: int
    out: bool  # of the pool, into host memory


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One forward."""

    chunks: tuple[Chunk, ...]
    published: tuple[int, ...]  # blocks others may already rely on; retracted if the forward fails
    num_cached_tokens: int  # prompt tokens it need not compute
    moves: tuple[Move, ...] = ()  # in this order, before the forward
    variant: int = 0  # which of those models that share the backbone it is of

    @property
    def num_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks if chunk.sequence is None)

    @property
    def num_reads(self) -> int:
        return sum(len(chunk.reads) for chunk in self.chunks)

    @property
    def num_scored(self) -> int:
        return sum(chunk.scored for chunk in self.chunks)
