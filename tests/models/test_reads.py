"""Where a sequence is read, and nowhere else."""

import numpy as np
import pytest
from rewardserve.models.reads import NothingToRead, Pattern, ReadAt, Reader, ReadPlan


def ids(*tokens: int) -> bytes:
    return np.array(tokens, "<i4").tobytes()


def test_a_row_beyond_a_sequences_end_is_never_read() -> None:
    """In a pack it would be another sequence's."""
    reader = Reader(ReadPlan(ReadAt.EVERY, Pattern((7,), offset=1)))
    assert reader.positions(ids(7, 1), ids(2, 7)) == (1,)
    with pytest.raises(NothingToRead):
        reader.positions(ids(1), ids(2, 7))


def test_a_gate_may_be_the_last_token_itself() -> None:
    reader = Reader(ReadPlan(ReadAt.GATED, Pattern((7, 8), offset=1), num_objectives=1))
    assert reader.positions(ids(7, 8), ids(7, 8)) == (3,)
    assert reader.positions(ids(7, 8), ids(9)) == (1, 2)


def test_the_last_occurrence_may_lie_in_the_prompt_or_across_its_end_and_has_to_be_there() -> None:
    reader = Reader(ReadPlan(ReadAt.LAST_OF, Pattern((7, 8), offset=1), what="sign"))
    assert reader.positions(ids(7, 8, 7, 8, 1), ids(2, 7)) == (3,)
    assert reader.positions(ids(7, 8, 7), ids(8, 2)) == (3,)
    with pytest.raises(NothingToRead, match=r"no sign \(token ids 7, 8\)"):
        reader.positions(ids(8, 7), ids(9, 8))


@pytest.mark.parametrize("at", [ReadAt.LAST_OF, ReadAt.GATED])
def test_an_earlier_occurrence_is_not_read_for_one_that_lies_at_the_end(at: ReadAt) -> None:
    reader = Reader(ReadPlan(at, Pattern((6, 7), offset=3), num_objectives=1))
    with pytest.raises(NothingToRead):
        reader.positions(ids(6, 7, 1, 2, 3), ids(5, 6, 7, 9))
