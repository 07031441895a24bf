"""Groups of nothing but ids take a short way through the encoder. It must lead to the same place as the long one."""

import numpy as np
import pytest
from checkpoints import VOCAB_SIZE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rewardserve.errors import InvalidRequest
from rewardserve.text.encoder import QUICK_IDS_BYTES, QUICK_PAIRS, EncodedRequest, Encoder, is_quickly_encoded
from rewardserve.types import Overflow, PlainText, ScoreRequest, TokenIds

MAX = 10
examples = settings(max_examples=400)
good = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8).map(lambda ids: np.array(ids, "<i4").tobytes())
wrong = st.sampled_from([-1, VOCAB_SIZE, 2**31 - 1, -(2**31)]).map(lambda i: np.array([1, i], "<i4").tobytes())
anything = st.one_of(good, good, good, good, wrong, st.binary(max_size=9))
groups = st.lists(st.tuples(anything, st.lists(anything, min_size=1, max_size=4)), min_size=1, max_size=3)


class LongWay(Encoder):
    def _as_sent(self, group, groups):
        return ()


def outcome(encoder: Encoder, request: ScoreRequest) -> EncodedRequest | tuple[str, str]:
    try:
        return encoder.encode(request)
    except InvalidRequest as error:
        return error.field, error.description


@examples
@given(groups=groups, overflow=st.sampled_from(Overflow))
@example(groups=[(bytes(4), [bytes(4 * (MAX - 1)), bytes(4)])], overflow=Overflow.ERROR)
@example(groups=[(bytes(4), [bytes(4 * MAX), bytes(4)])], overflow=Overflow.TRUNCATE_RESPONSE_RIGHT)
@example(groups=[(bytes(4), [b"", bytes(4)])], overflow=Overflow.ERROR)
@example(groups=[(b"", [bytes(4)])], overflow=Overflow.ERROR)
def test_both_ways_give_the_same_request_and_the_same_errors(tools, groups, overflow) -> None:
    wrapped = [(TokenIds(prompt), list(map(TokenIds, responses))) for prompt, responses in groups]
    request = tools.request(*wrapped, overflow=overflow)
    short, long = (kind(None, VOCAB_SIZE, MAX) for kind in (Encoder, LongWay))
    assert outcome(short, request) == outcome(long, request)


def test_the_bytes_are_not_copied(tools) -> None:
    prompt, responses = tools.pack([1, 2]), [tools.pack([3]), tools.pack([4, 5])]
    group = Encoder(None, VOCAB_SIZE, MAX).encode(tools.request((prompt, responses))).groups[0]
    assert group.prompt is prompt.data
    assert all(sent is response.data for sent, response in zip(group.responses, responses, strict=True))


@pytest.mark.parametrize(
    ("prompt", "responses", "quick"),
    [
        (TokenIds(bytes(4)), [TokenIds(bytes(4))] * QUICK_PAIRS, True),
        (TokenIds(bytes(4)), [TokenIds(bytes(4))] * (QUICK_PAIRS + 1), False),
        (TokenIds(bytes(4)), [TokenIds(bytes(QUICK_IDS_BYTES - 4))], True),
        (TokenIds(bytes(4)), [TokenIds(bytes(QUICK_IDS_BYTES))], False),
        (TokenIds(bytes(4)), [TokenIds(bytes(4)), "text"], False),
        (PlainText("text"), [TokenIds(bytes(4))], False),
    ],
)
def test_only_few_ids_are_quick(tools, prompt, responses, quick: bool) -> None:
    assert is_quickly_encoded(tools.request((prompt, responses))) == quick
    if len(responses) > 1:
        groups = [(prompt, [response]) for response in responses]
        assert is_quickly_encoded(tools.request(*groups)) == quick, "groups count together"
