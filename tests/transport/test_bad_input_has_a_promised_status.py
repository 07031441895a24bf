"""Whatever a caller sends, the answer is the promised status, names the field, and the next caller is served."""

import asyncio
import gc

import grpc
import pytest
from rewardserve.v1 import scoring_pb2

Code = grpc.StatusCode
Prompt, Response, Group = scoring_pb2.Prompt, scoring_pb2.Response, scoring_pb2.Group
Message, Conversation = scoring_pb2.ChatMessage, scoring_pb2.Conversation


@pytest.fixture(autouse=True)
async def the_server_still_serves(served):
    yield
    await served.good()


EMPTY_PROMPTS = {
    "text": Prompt(text=""),
    "conversation": Prompt(conversation=Conversation()),
    "token_ids": Prompt(token_ids=b""),
    "rendered": Prompt(rendered=""),
}


@pytest.mark.parametrize("kind", EMPTY_PROMPTS)
async def test_an_empty_prompt_is_refused_by_its_field(served, kit, kind):
    group = Group(prompt=EMPTY_PROMPTS[kind], responses=[Response(text="x")])
    good = Group(prompt=Prompt(text="hi"), responses=[Response(text="x")])
    error = await kit.refused(served.scoring.Score(scoring_pb2.ScoreRequest(groups=[good, group])))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[1].prompt"])


@pytest.mark.parametrize("kind", EMPTY_PROMPTS)
async def test_rank_and_compare_name_the_prompt_of_their_own_message(served, kit, kind):
    responses = [Response(text="x"), Response(text="y")]
    rank = served.scoring.Rank(scoring_pb2.RankRequest(prompt=EMPTY_PROMPTS[kind], responses=responses))
    assert (await kit.refused(rank)).fields == ["prompt"]
    a, b = responses
    pair = scoring_pb2.CompareRequest(prompt=EMPTY_PROMPTS[kind], response_a=a, response_b=b)
    assert (await kit.refused(served.scoring.Compare(pair))).fields == ["prompt"]


async def test_no_groups_is_refused(served, kit):
    error = await kit.refused(served.scoring.Score(scoring_pb2.ScoreRequest()))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups"])


async def test_a_group_without_responses_is_refused(served, kit):
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [])))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].responses"])


async def test_rank_without_responses_names_its_own_field(served, kit):
    error = await kit.refused(served.scoring.Rank(scoring_pb2.RankRequest(prompt=Prompt(text="hi"))))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["responses"])


async def test_too_many_responses_names_groups_and_the_limit(served, kit):
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]] * 10_000)))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups"])
    assert "10000" in error.message and "8192" in error.message
    many = scoring_pb2.RankRequest(prompt=Prompt(text="hi"), responses=[Response(text="x")] * 10_000)
    error = await kit.refused(served.scoring.Rank(many))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["responses"])


async def test_a_message_of_a_gigabyte_is_too_large_and_not_worth_a_retry(served, kit):
    data = bytes(1 << 30)
    error = await kit.refused(served.raw("Scoring/Score", data, timeout=90))
    assert (error.code, error.retry_after_s) == (Code.RESOURCE_EXHAUSTED, None)
    del data
    gc.collect()


@pytest.mark.parametrize("wrong", [258, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("where", ["prompt", "response"])
async def test_ids_outside_the_vocabulary_are_refused_by_field_and_position(served, kit, wrong, where):
    prompt, response = ([1, wrong], [2]) if where == "prompt" else ([1], [2, wrong])
    error = await kit.refused(served.scoring.Score(kit.ids_request(prompt, [[3], response])))
    field = "groups[0].prompt.token_ids" if where == "prompt" else "groups[0].responses[1].token_ids"
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, [field])
    assert str(wrong) in error.message and "position 1" in error.message and "258" in error.message


@pytest.mark.parametrize("num_bytes", [1, 3, 5, 6])
async def test_bytes_that_are_no_whole_ids_are_refused(served, kit, num_bytes):
    group = Group(prompt=Prompt(token_ids=bytes(num_bytes)), responses=[Response(token_ids=bytes(4))])
    error = await kit.refused(served.scoring.Score(scoring_pb2.ScoreRequest(groups=[group])))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].prompt.token_ids"])
    pair = scoring_pb2.CompareRequest(
        prompt=Prompt(token_ids=bytes(4)),
        response_a=Response(token_ids=bytes(4)),
        response_b=Response(token_ids=bytes(num_bytes)),
    )
    error = await kit.refused(served.scoring.Compare(pair))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["response_b.token_ids"])


async def test_an_unknown_model_is_not_found_and_the_served_ones_are_listed(serve, kit):
    async with serve(models=("one", "two")) as served:
        for name in ("three", ""):
            error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]], model=name)))
            assert error.code is Code.NOT_FOUND
            assert "one, two" in error.message
        error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]], model="three")))
        assert "'three'" in error.message


@pytest.mark.parametrize("name", ["x" * 5_000, "x" * 100_000, "\U0001f44d" * 5_000], ids=["long", "longer", "wide"])
async def test_a_very_long_model_name_is_still_only_not_found(served, kit, name):
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]], model=name)))
    assert error.code is Code.NOT_FOUND


async def test_an_unknown_overflow_is_refused(served, kit):
    options = scoring_pb2.ScoreOptions(overflow=7)
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]], options=options)))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["options.overflow"])
    assert "7" in error.message and "TRUNCATE_PROMPT_LEFT" in error.message


@pytest.mark.parametrize("priority", [101, -101, 2**31 - 1, -(2**31)])
async def test_a_priority_out_of_range_is_refused(served, kit, priority):
    options = scoring_pb2.ScoreOptions(priority=priority)
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]], options=options)))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["options.priority"])


@pytest.mark.parametrize("priority", [100, -100])
async def test_the_ends_of_the_priority_range_are_served(served, kit, priority):
    options = scoring_pb2.ScoreOptions(priority=priority)
    await served.scoring.Score(kit.ids_request([1], [[2]], options=options))
    assert served.engine.seen[-1].priority == priority


async def test_a_prompt_or_response_of_no_kind_is_refused(served, kit):
    no_prompt = Group(responses=[Response(text="x")])
    error = await kit.refused(served.scoring.Score(scoring_pb2.ScoreRequest(groups=[no_prompt])))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].prompt"])
    no_response = Group(prompt=Prompt(text="hi"), responses=[Response(text="x"), Response()])
    error = await kit.refused(served.scoring.Score(scoring_pb2.ScoreRequest(groups=[no_response])))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].responses[1]"])
    half = scoring_pb2.CompareRequest(prompt=Prompt(text="hi"), response_a=Response(text="x"))
    error = await kit.refused(served.scoring.Compare(half))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["response_b"])


@pytest.mark.parametrize("method", ["Scoring/Score", "Scoring/Rank", "Scoring/Compare", "Models/Get", "Models/Load"])
@pytest.mark.parametrize("data", [b"\x0a\x02\xc3\x28", b"\xff\xff\xff\xff", b"\x0a\x7f", bytes(range(256))])
async def test_what_is_no_message_is_invalid_and_not_our_internal_error(served, kit, method, data):
    """The first is a string field that is not UTF-8, which grpc by itself answers INTERNAL."""
    error = await kit.refused(served.raw(method, data))
    assert error.code is Code.INVALID_ARGUMENT
    assert "not a valid rewardserve.v1." in error.message


async def test_text_for_a_model_without_tokenizer_is_refused(serve, kit):
    async with serve(text=None) as served:
        error = await kit.refused(served.scoring.Score(kit.text_request(Prompt(text="hi"), "x")))
        assert error.code is Code.INVALID_ARGUMENT
        assert "token_ids" in error.message and "this fake has none" in error.message
        await served.good()


async def test_a_conversation_needs_a_template(serve, kit):
    async with serve(kit.text_spec(template=None)) as served:
        conversation = Conversation(messages=[Message(role="user", content="hi")])
        error = await kit.refused(served.scoring.Score(kit.text_request(Prompt(conversation=conversation), "x")))
        assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].prompt.conversation"])
        await served.scoring.Score(kit.text_request(Prompt(text="hi"), "x"))


async def test_a_conversation_the_template_refuses_is_the_callers_error(served, kit):
    conversation = Conversation(messages=[Message(role="nobody", content="hi")])
    error = await kit.refused(served.scoring.Score(kit.text_request(Prompt(conversation=conversation), "x")))
    assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].prompt"])
    assert "unknown role" in error.message


FAILING_TEMPLATES = {
    "division by zero": "{{ 1 / (messages[0]['content'] | length - 4) }}",
    "a sum of text and number": "{{ messages[0]['content'] + 1 if messages[0]['content'] == 'boom' else 'ok' }}",
    "a missing key": "{{ messages[0]['tools']['x'] if messages[0]['content'] == 'boom' else 'ok' }}",
    "half a character": "{{ '\\ud83d' if messages[0]['content'] == 'boom' else 'ok' }}",
    "words that are no UTF-8": "{{ raise_exception('\\ud83d') if messages[0]['content'] == 'boom' else 'ok' }}",
}


@pytest.mark.parametrize("what", FAILING_TEMPLATES)
async def test_a_template_that_fails_for_any_reason_is_an_answer(serve, kit, what):
    async with serve(kit.text_spec(FAILING_TEMPLATES[what])) as served:
        error = await kit.refused(served.scoring.Score(kit.text_request(Prompt(text="boom"), "x"), timeout=20))
        assert (error.code, error.fields) == (Code.INVALID_ARGUMENT, ["groups[0].prompt"])


async def test_an_engine_that_fails_unforeseen_is_our_internal_error(served, kit):
    served.engine.raises = RuntimeError("a secret of ours")
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]])))
    assert error.code is Code.INTERNAL
    served.engine.raises = None


async def test_a_deadline_that_passes_in_the_engine_is_answered_and_its_work_dropped(served, kit):
    served.engine.hold()
    error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]]), timeout=0.3))
    assert error.code is Code.DEADLINE_EXCEEDED
    assert served.engine.seen[-1].deadline is not None
    await kit.eventually(lambda: served.engine.num_in_flight == 0)
    assert served.engine.num_cancelled == 1
    assert served.app.registry.get("m").admission.num_requests == 0
    served.engine.release()


async def test_a_caller_who_leaves_has_its_work_dropped(served, kit):
    served.engine.hold()
    call = served.scoring.Score(kit.ids_request([1], [[2]]))
    await kit.eventually(lambda: served.engine.num_in_flight == 1)
    call.cancel()
    await kit.eventually(lambda: served.engine.num_cancelled == 1)
    await kit.eventually(lambda: served.app.registry.get("m").admission.num_requests == 0)
    served.engine.release()


async def test_beyond_the_limit_of_requests_the_server_says_when_to_come_back(serve, kit):
    async with serve(max_queued_requests=2) as served:
        served.engine.hold()
        calls = [served.scoring.Score(kit.ids_request([1], [[2]])) for _ in range(2)]
        await kit.eventually(lambda: served.engine.num_in_flight == 2)
        error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]])))
        assert error.code is Code.RESOURCE_EXHAUSTED and error.retry_after_s > 0
        served.engine.release()
        await asyncio.gather(*calls)
        await served.good()


async def test_beyond_the_limit_of_tokens_the_server_says_when_to_come_back(serve, kit):
    async with serve(max_queued_tokens=10) as served:
        served.engine.hold()
        first = served.scoring.Score(kit.ids_request([1] * 9, [[2] * 9]))  # alone it is let in, however large
        await kit.eventually(lambda: served.engine.num_in_flight == 1)
        error = await kit.refused(served.scoring.Score(kit.ids_request([1], [[2]])))
        assert error.code is Code.RESOURCE_EXHAUSTED and error.retry_after_s > 0
        served.engine.release()
        await first
        await served.good()
