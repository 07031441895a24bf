"""What concerns one response is the status of its item, never a number and never its siblings' business."""

import grpc
import pytest
from rewardserve.engine.fake import fake_score
from rewardserve.v1 import scoring_pb2

Code = grpc.StatusCode
Prompt, Response = scoring_pb2.Prompt, scoring_pb2.Response
OUT_OF_RANGE, INVALID_ARGUMENT, INTERNAL = 11, 3, 13


def codes(items):
    return [item.status.code for item in items]


async def score(served, request):
    reply = await served.scoring.Score(request, timeout=30)
    return reply.groups[0].items


async def test_an_empty_response_of_ids_fails_alone(served, kit):
    items = await score(served, kit.ids_request([1, 2], [[3], [], [4]]))
    assert codes(items) == [0, INVALID_ARGUMENT, 0]
    assert [item.HasField("score") for item in items] == [True, False, True]
    assert items[2].score == pytest.approx(fake_score(kit.pack([1, 2]), kit.pack([4])))


async def test_a_request_of_nothing_but_empty_responses_is_answered(served, kit):
    items = await score(served, kit.ids_request([1, 2], [[], []]))
    assert codes(items) == [INVALID_ARGUMENT, INVALID_ARGUMENT]
    assert not served.engine.seen


async def test_an_empty_text_is_a_turn_where_there_is_a_template(served, kit):
    (item,) = await score(served, kit.text_request(Prompt(text="hi"), ""))
    assert item.status.code == 0 and item.num_response_tokens == 1  # the end of the turn


async def test_an_empty_text_after_rendered_text_is_nothing_to_score(served, kit):
    items = await score(served, kit.text_request(Prompt(rendered="hi"), "", "x"))
    assert codes(items) == [INVALID_ARGUMENT, 0]


async def test_exactly_max_length_is_scored_and_one_more_is_out_of_range(served, kit):
    prompt = [7] * (kit.MAX_LENGTH - 3)
    items = await score(served, kit.ids_request(prompt, [[1] * 3, [1] * 4]))
    assert codes(items) == [0, OUT_OF_RANGE]
    assert not items[1].HasField("score") and not items[1].truncated
    assert "65" in items[1].status.message and "64" in items[1].status.message
    assert (items[1].num_prompt_tokens, items[1].num_response_tokens) == (61, 4)


@pytest.mark.parametrize("kind", ["text", "rendered"])
async def test_text_is_counted_with_its_template(served, kit, kind):
    begin = "<|im_start|>user\n"
    end = "<|im_end|><|im_start|>assistant\n"
    num_fixed = 1 + len("user\n") + 1 + 1 + len("assistant\n") + 1  # specials are one token, all else is bytes
    text = "x" * (kit.MAX_LENGTH - num_fixed - 2)
    prompt, close = (Prompt(text=text), "") if kind == "text" else (Prompt(rendered=begin + text + end), "<|im_end|>")
    items = await score(served, kit.text_request(prompt, "ab" + close, "abc" + close))
    assert codes(items) == [0, OUT_OF_RANGE]
    assert items[0].num_prompt_tokens + items[0].num_response_tokens == kit.MAX_LENGTH


TRUNCATIONS = {
    "prompt": (scoring_pb2.OVERFLOW_TRUNCATE_PROMPT_LEFT, slice(1, None), slice(None)),
    "response": (scoring_pb2.OVERFLOW_TRUNCATE_RESPONSE_RIGHT, slice(None), slice(None, -1)),
}


@pytest.mark.parametrize("what", TRUNCATIONS)
async def test_one_token_too_many_is_cut_off_and_flagged(served, kit, what):
    overflow, kept_prompt, kept_response = TRUNCATIONS[what]
    prompt, response = list(range(60)), [1, 2, 3, 4, 5]
    request = kit.ids_request(prompt, [response, response[:4]], options=scoring_pb2.ScoreOptions(overflow=overflow))
    cut, whole = await score(served, request)
    assert (cut.truncated, whole.truncated) == (True, False)
    assert cut.score == pytest.approx(fake_score(kit.pack(prompt[kept_prompt]), kit.pack(response[kept_response])))
    assert whole.score == pytest.approx(fake_score(kit.pack(prompt), kit.pack(response[:4])))
    assert cut.num_prompt_tokens + cut.num_response_tokens == kit.MAX_LENGTH


@pytest.mark.parametrize("what", TRUNCATIONS)
async def test_what_truncation_cannot_save_is_out_of_range(served, kit, what):
    prompt, response = ([1], [2] * 65) if what == "prompt" else ([1] * 64, [2])
    options = scoring_pb2.ScoreOptions(overflow=TRUNCATIONS[what][0])
    (item,) = await score(served, kit.ids_request(prompt, [response], options=options))
    assert item.status.code == OUT_OF_RANGE and not item.HasField("score")


async def test_a_score_that_is_no_number_fails_alone(served, kit):
    served.engine.fail_tokens = {9}
    items = await score(served, kit.ids_request([1], [[2], [9], [3]]))
    assert codes(items) == [0, INTERNAL, 0] and not items[1].HasField("score")


async def test_rank_lists_what_failed_apart(served, kit):
    served.engine.fail_tokens = {9}
    responses = [Response(token_ids=kit.pack(ids)) for ids in ([2], [9], [3], [], [4], [5] * 70)]
    request = scoring_pb2.RankRequest(prompt=Prompt(token_ids=kit.pack([1])), responses=responses)
    reply = await served.scoring.Rank(request)
    scores = [entry.item.score for entry in reply.ranked]
    assert sorted(entry.index for entry in reply.ranked) == [0, 2, 4]
    assert scores == sorted(scores, reverse=True)
    assert [(e.index, e.item.status.code) for e in reply.failed] == [
        (1, INTERNAL),
        (3, INVALID_ARGUMENT),
        (5, OUT_OF_RANGE),
    ]


@pytest.mark.parametrize(("top_k", "num_ranked"), [(0, 3), (1, 1), (3, 3), (4, 3), (2**31 - 1, 3)])
async def test_top_k_bounds_what_is_ranked_but_not_what_failed(served, kit, top_k, num_ranked):
    responses = [Response(token_ids=kit.pack(ids)) for ids in ([2], [], [3], [4])]
    request = scoring_pb2.RankRequest(prompt=Prompt(token_ids=kit.pack([1])), responses=responses, top_k=top_k)
    reply = await served.scoring.Rank(request)
    assert (len(reply.ranked), len(reply.failed)) == (num_ranked, 1)


async def test_a_negative_top_k_is_refused(served, kit):
    request = scoring_pb2.RankRequest(prompt=Prompt(text="hi"), responses=[Response(text="x")], top_k=-1)
    error = await kit.refused(served.scoring.Rank(request))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["top_k"])


async def test_equal_scores_keep_the_order_sent(served, kit):
    responses = [Response(token_ids=kit.pack([i % 2])) for i in range(10)]
    reply = await served.scoring.Rank(
        scoring_pb2.RankRequest(prompt=Prompt(token_ids=kit.pack([1])), responses=responses)
    )
    order = [entry.index for entry in reply.ranked]
    assert order in ([0, 2, 4, 6, 8, 1, 3, 5, 7, 9], [1, 3, 5, 7, 9, 0, 2, 4, 6, 8])


@pytest.mark.parametrize(
    ("failing", "code"), [([], Code.INVALID_ARGUMENT), ([9], Code.INTERNAL), ([1] * 70, Code.OUT_OF_RANGE)]
)
@pytest.mark.parametrize("side", ["response_a", "response_b"])
async def test_compare_with_a_side_that_has_no_score_fails_with_its_code(served, kit, failing, code, side):
    served.engine.fail_tokens = {9}
    sides = {"response_a": Response(token_ids=kit.pack([2])), "response_b": Response(token_ids=kit.pack([3]))}
    sides[side] = Response(token_ids=kit.pack(failing))
    request = scoring_pb2.CompareRequest(prompt=Prompt(token_ids=kit.pack([1])), **sides)
    error = await kit.refused(served.scoring.Compare(request))
    assert error.code is code
    assert side in error.message
    assert error.fields == ([side] if code is Code.INVALID_ARGUMENT else [])


async def test_compare_gives_margin_and_probability(served, kit):
    request = scoring_pb2.CompareRequest(
        prompt=Prompt(token_ids=kit.pack([1])),
        response_a=Response(token_ids=kit.pack([2])),
        response_b=Response(token_ids=kit.pack([3])),
    )
    reply = await served.scoring.Compare(request)
    assert reply.margin == pytest.approx(reply.a.score - reply.b.score)
    turned = scoring_pb2.CompareRequest(
        prompt=request.prompt, response_a=request.response_b, response_b=request.response_a
    )
    other = await served.scoring.Compare(turned)
    assert reply.probability_a + other.probability_a == pytest.approx(1)
    assert (reply.probability_a > 0.5) == (reply.margin > 0)


async def test_ids_of_groups_and_requests_come_back_and_a_missing_request_id_is_made(served, kit):
    groups = [kit.ids_group([i], [[2]] * i, id=f"g{i}") for i in (1, 2, 3)]
    reply = await served.scoring.Score(scoring_pb2.ScoreRequest(request_id="r", groups=groups))
    assert reply.request_id == "r"
    assert [(g.id, len(g.items)) for g in reply.groups] == [("g1", 1), ("g2", 2), ("g3", 3)]
    made = {(await served.scoring.Score(scoring_pb2.ScoreRequest(groups=groups))).request_id for _ in range(3)}
    assert len(made) == 3 and "" not in made
