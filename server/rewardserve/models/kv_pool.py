"""Where the keys and values of stored blocks lie: on the model's device, and in host memory behind it."""

import weakref

import torch
from rewardserve_kernels.ragged import BLOCK_TOKENS
from rewardserve_kernels.workspace import Workspace, make_resident, untouched


class KVPool:
    """Keys and values of stored blocks, a pair of tensors [blocks, kv_heads, BLOCK_TOKENS, head_size] for each layer.

    Layers are allocated when first met, because only the attention call knows their shapes, or all at once as in
    another pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.workspace = Workspace()  # of the attention that reads from here
        self.whole: torch.Tensor | None = None  # [layers, 2, blocks, kv_heads, BLOCK_TOKENS, head_size]
        self.sums: torch.Tensor | None = None  # [blocks, hidden_size] fp32, of final hidden states, for means
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def layer(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pools of layer `index`, shaped for k and v [kv_heads, rows, head_size]."""
        if index == len(self._layers):
            shapes = [(self.num_blocks, t.shape[0], BLOCK_TOKENS, t.shape[2]) for t in (k, v)]
            # No slot is read before it is written.
            self._layers.append((untouched(shapes[0], k), untouched(shapes[1], v)))
        return self._layers[index]

    def allocate_like(self, other: "KVPool") -> None:
        """All layers, resident: memory that is not there is missed before the first request."""
        like, shapes = other._layers[0][0], {t.shape[1:] for pair in other._layers for t in pair}
        if len(shapes) == 1:  # as it nearly always is: one tensor, so that a block of all layers is one slice
            self.whole = untouched((len(other._layers), 2, self.num_blocks, *like.shape[1:]), like)
            self._layers = [(pair[0], pair[1]) for pair in self.whole]
        else:
            self._layers = [(self._new(k), self._new(v)) for k, v in other._layers]
        make_resident([self.whole] if self.whole is not None else (t for pair in self._layers for t in pair))

    def keep_sums(self, hidden_size: int, device: torch.device) -> None:
        """For a head that reads means."""
        self.sums = torch.zeros(self.num_blocks, hidden_size, device=device)

    def _new(self, like: torch.Tensor) -> torch.Tensor:
        return untouched((self.num_blocks, *like.shape[1:]), like)

    @property
    def bytes_per_block(self) -> int:
        """Over all layers met so far."""
        return sum(t.nbytes for pair in self._layers for t in pair) // self.num_blocks


class HostBlocks:
    """Contents of blocks in host memory, pinned where the pool is on a GPU: copies go on while the host does."""

    def __init__(self, pool: KVPool, num_slots: int) -> None:
        """`pool` must be one tensor (`whole`). Raises RuntimeError where so much memory cannot be pinned."""
        assert pool.whole is not None
        self._pool = pool.whole
        layers, two, _, *block = pool.whole.shape
        self._slots = torch.empty((num_slots, layers, two, *block), dtype=pool.whole.dtype)
        self._sums = pool.sums
        self._sum_slots = None if pool.sums is None else torch.empty(num_slots, pool.sums.shape[1])
        if pool.whole.is_cuda:
            for slots in (self._slots, self._sum_slots):
                if slots is not None:
                    self._pin(slots)

    def _pin(self, slots: torch.Tensor) -> None:
        """Where it lies. torch's own pinned memory comes in powers of two: of 40 GB asked for it would take 64."""
        runtime, address = torch.cuda.cudart(), slots.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, slots.nbytes, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, address)

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def copy_out(self, block: int, slot: int) -> None:
        """In its turn with all else on the current stream."""
        self._slots[slot].copy_(self._pool[:, :, block], non_blocking=True)
        if self._sums is not None and self._sum_slots is not None:
            self._sum_slots[slot].copy_(self._sums[block], non_blocking=True)

    def copy_back(self, block: int, slot: int) -> None:
        """Likewise."""
        self._pool[:, :, block].copy_(self._slots[slot], non_blocking=True)
        if self._sums is not None and self._sum_slots is not None:
            self._sums[block].copy_(self._sum_slots[slot], non_blocking=True)
