"""Token ids arrive as they were, whatever held them."""

import pickle
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewardserve.client import Group, TokenIds, messages

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=50)


class Tensor:
    """As torch has it: no buffer, iterates over zero-dimensional tensors, but knows tolist."""

    def __init__(self, ids):
        self._ids = ids

    def tolist(self):
        return self._ids


@given(IDS)
def test_every_holder_of_ids_gives_the_same_bytes(ids):
    packed = struct.pack(f"<{len(ids)}i", *ids)
    holders = [ids, tuple(ids), iter(ids), Tensor(ids), packed, bytearray(packed), TokenIds(ids)]
    holders += [array(code, ids) for code in "ilqLQI"]
    holders += [memoryview(array("i", [id for id in ids for _ in range(2)]))[::2]]  # not contiguous
    for holder in holders:
        token_ids = TokenIds(holder)
        assert token_ids.data == packed and list(token_ids) == ids and len(token_ids) == len(ids)
    assert pickle.loads(pickle.dumps(token_ids)) == token_ids == TokenIds(ids) and hash(token_ids)


@given(st.lists(st.integers(), min_size=1).filter(lambda ids: not all(0 <= id < 2**31 for id in ids)))
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError):
        TokenIds(ids)


@pytest.mark.parametrize("ids", [array("q", [2**31]), array("i", [1, -100]), array("q", [-1]), b"12345"])
def test_buffers_out_of_range_are_refused(ids):
    with pytest.raises(ValueError):
        TokenIds(ids)


@pytest.mark.parametrize(
    "ids",
    [
        "text",
        [1.0],
        ["1"],
        array("d", [1.0]),
        array("b", [1]),
        memoryview(b"1234"),
        memoryview(bytes(8)).cast("i", (2, 1)),
        Tensor([[1], [2]]),
        5,
    ],
)
def test_what_is_not_a_row_of_integers_is_refused(ids):
    with pytest.raises(TypeError):
        TokenIds(ids)


def test_numpy_arrays_are_taken_through_their_buffer():
    numpy = pytest.importorskip("numpy")
    for dtype in ("int32", "int64", "uint32", "int16"):
        assert list(TokenIds(numpy.array([5, 0, 7], dtype))) == [5, 0, 7]
    assert list(TokenIds(numpy.arange(10)[::3])) == [0, 3, 6, 9]


def test_ids_travel_as_bytes():
    message = messages.group(Group(TokenIds([1, 2]), [TokenIds([3]), "text"]))
    assert message.prompt.token_ids == b"\1\0\0\0\2\0\0\0"
    assert message.responses[0].token_ids == b"\3\0\0\0" and message.responses[1].text == "text"
