"""Token ids of any shape a caller may hold them in -> the wire's bytes. Knows nothing of tokenizers."""

import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_INT32 = "i"
_INTEGER_FORMATS = frozenset("hilqHILQ")  # of memoryview; bytes ("B") are left out: ids or packed ids, nobody can tell


@dataclass(frozen=True, slots=True, init=False, repr=False)
class TokenIds:
    """Token ids, held as packed little-endian int32.

    `ids` may be `bytes` (packed already), any buffer of integers with one dimension (`array.array`, a numpy array), an
    object with `tolist()` (a torch tensor), or any iterable of ints. Raises TypeError for what is not integers and
    ValueError for ids that are negative (a label mask such as -100 is not a token) or larger than int32.
    """

    data: bytes

    def __init__(self, ids: "bytes | bytearray | TokenIds | Iterable[int]") -> None:
        object.__setattr__(self, "data", _packed(ids))  # the only write; the class is frozen from here on

    def __len__(self) -> int:
        return len(self.data) // 4

    def __iter__(self) -> Iterator[int]:
        return iter(_little_endian(array(_INT32, self.data)))

    def __repr__(self) -> str:
        return f"TokenIds({len(self)} ids)"


def _packed(ids: bytes | bytearray | TokenIds | Iterable[int]) -> bytes:
    if isinstance(ids, TokenIds):
        return ids.data
    if isinstance(ids, bytes | bytearray):
        if len(ids) % 4:
            raise ValueError(f"{len(ids)} bytes are not a whole number of int32 token ids")
        return bytes(ids)
    values = _int32(ids)
    if values and min(values) < 0:
        raise ValueError(f"token id {min(values)} is negative")
    return _little_endian(values).tobytes()


def _int32(ids: Iterable[int]) -> "array[int]":
    try:
        view = memoryview(ids)  # type: ignore[arg-type]
    except TypeError:
        # torch tensors have no buffer; tolist() is their one way out in C speed that needs no numpy.
        return _int32_of(ids.tolist() if hasattr(ids, "tolist") else ids)
    if view.ndim != 1 or view.format not in _INTEGER_FORMATS:
        raise TypeError(f"token ids are one-dimensional integers, not {view.ndim} dimensions of format {view.format!r}")
    if view.format == _INT32 and view.c_contiguous:
        return array(_INT32, view.tobytes())
    return _int32_of(view.tolist())


def _int32_of(ids: Iterable[int]) -> "array[int]":
    if isinstance(ids, str):
        raise TypeError("token ids are integers, not text")
    try:
        return array(_INT32, ids)
    except OverflowError as error:
        raise ValueError(f"a token id does not fit int32: {error}") from None


def _little_endian(values: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values
