"""Memory for intermediate results, kept from one call to the next."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def untouched(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor of `like`'s dtype and device that is not set to anything.

    On a CPU it is mapped apart from the heap: its pages cost nothing until they are used, are given back with it, and
    take no place on the heap that is resident already and that others would use. Raises MemoryError.
    """
    if like.device.type != "cpu":
        return like.new_empty(*shape)
    count = math.prod(shape)
    num_bytes = max(1, count * like.element_size())
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # whose kind says nothing of memory
        raise MemoryError(f"{num_bytes} bytes cannot be mapped: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)  # the first use of a page costs as much as filling it, or more
    return torch.frombuffer(pages, dtype=like.dtype, count=count).view(*shape)


MADV_POPULATE_WRITE = 23  # of Linux 5.14 and later
PIECE_BYTES = 64 << 20  # made at a time by one thread; whole pages


def make_resident(tensors: Iterable[torch.Tensor]) -> None:
    """Has the pages of `untouched` tensors made now and not in the middle of a forward, where each costs a fault.

    Where the system cannot do that they are made as they are used.
    """
    try:
        madvise = ctypes.CDLL("libc.so.6").madvise
    except (OSError, AttributeError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pieces = [
        (t.data_ptr() + begin, min(PIECE_BYTES, t.nbytes - begin))
        for t in tensors
        if t.device.type == "cpu"
        for begin in range(0, t.nbytes, PIECE_BYTES)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda piece: madvise(*piece, MADV_POPULATE_WRITE), pieces))


class Workspace:
    """Hands out tensors by name; what a name was given before is overwritten. Not for use by several threads at once.

    Sizes that follow the length of a sequence differ from call to call. Allocated each time they would leave the heap
    full of holes that nothing fits: thirteen gigabytes for an item of 32,768 tokens that needs two hundred megabytes.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Contiguous, of `like`'s dtype and device; its values are whatever was there."""
        key, count = (name, like.dtype, like.device), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < count:
            self._buffers.pop(key, None)  # freed before the larger one is made
            buffer = self._buffers[key] = untouched([count + count // 4], like)
        return buffer[:count].view(*shape)
