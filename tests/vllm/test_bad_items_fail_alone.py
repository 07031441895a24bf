"""What concerns one response is the status of its item; a request that is malformed is refused; the server lives on."""

import checkpoints
import grpc
import pytest
from rewardserve.v1 import scoring_pb2
from safetensors.torch import load_file, save_file

INVALID_ARGUMENT, OUT_OF_RANGE, INTERNAL = 3, 11, 13
POISON = 398  # a token whose embedding is infinite


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("infinite")
    checkpoints.save_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Few blocks, so that they are soon used again.
    return start("--model", f"tiny={folder}", "--engine", "vllm", "--prefix-cache-mb", "8").ready()


@pytest.fixture
def engine_stays(server, kit):
    before = server.engine().pid
    yield
    reply = server.scoring.Score(kit.ids_request([1, 2], [[3]]), timeout=kit.ANTI_HANG_S)
    assert kit.scores_of(reply) != [None]
    assert server.engine().pid == before and server.metric("engine_restarts_total") == 0


def clean_ids(kit, seed, length):
    return [i for i in kit.random_ids(seed, length + 20) if i != POISON][:length]


def items(server, kit, prompt, responses, **fields):
    request = kit.ids_request(prompt, responses, **fields)
    return server.scoring.Score(request, timeout=kit.ANTI_HANG_S).groups[0].items


def test_empty_and_over_long_responses_fail_alone(server, kit, engine_stays):
    prompt = clean_ids(kit, 1, 100)
    responses = [clean_ids(kit, 2, 9), [], [5] * 1949, [5] * 1948, clean_ids(kit, 3, 30)]
    got = items(server, kit, prompt, responses)
    assert [item.status.code for item in got] == [0, INVALID_ARGUMENT, OUT_OF_RANGE, 0, 0]
    assert [item.HasField("score") for item in got] == [True, False, False, True, True]


@pytest.mark.parametrize("wrong", [400, 2**31 - 1, -1])
def test_an_id_outside_the_vocabulary_is_refused_by_field_and_position(server, kit, engine_stays, wrong):
    with pytest.raises(grpc.RpcError) as caught:
        items(server, kit, [1], [[2], [3, wrong]])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "groups[0].responses[1].token_ids" in caught.value.details() and "position 1" in caught.value.details()


def test_truncation_is_done_before_the_engine(server, kit, engine_stays):
    options = scoring_pb2.ScoreOptions(overflow=scoring_pb2.OVERFLOW_TRUNCATE_PROMPT_LEFT)
    (item,) = items(server, kit, [5] * 50, [clean_ids(kit, 60, 2048)], options=options)
    assert item.truncated and (item.num_prompt_tokens, item.num_response_tokens) == (0, 2048)
    assert item.HasField("score")


def test_a_score_that_is_not_a_number_fails_its_own_response_and_no_other(server, kit, engine_stays):
    prompt = clean_ids(kit, 1, 200)
    good = [clean_ids(kit, 10 + i, 20 + i) for i in range(6)]
    bad = [POISON, *clean_ids(kit, 30, 5)]
    alone = [items(server, kit, prompt, [response])[0].score for response in good]
    mixed = items(server, kit, prompt, [*good[:3], bad, *good[3:]])
    assert [item.status.code for item in mixed] == [0, 0, 0, INTERNAL, 0, 0, 0]
    assert not mixed[3].HasField("score") and "nan" in mixed[3].status.message
    assert [item.score for item in mixed if item.HasField("score")] == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_infinite_prompts_leave_nothing_behind_in_the_prefix_cache(server, kit, engine_stays):
    """Blocks that held NaN are given to others: what is masked there must not leak (0 * NaN is NaN)."""
    asked = [(clean_ids(kit, 100 + i, 130 + 17 * i), [clean_ids(kit, 200 + i, 9)]) for i in range(8)]
    wanted = [items(server, kit, *pair)[0].score for pair in asked]
    for i in range(server.model().prefix_cache_tokens // 1500 + 3):  # every block has held NaN once
        (item,) = items(server, kit, [POISON, *clean_ids(kit, 300 + i, 1500)], [[1]])
        assert item.status.code == INTERNAL and not item.HasField("score")
    assert [items(server, kit, *pair)[0].score for pair in asked] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_metrics_agree_with_what_was_sent(server, kit, engine_stays):
    before = server.metrics()
    prompt = clean_ids(kit, 70, 300)
    replies = [
        server.scoring.Score(kit.ids_request(prompt, [clean_ids(kit, 71, 9), [], [4]]), timeout=kit.ANTI_HANG_S)
        for _ in range(2)
    ]
    cached = [reply.groups[0].items[0].num_cached_tokens for reply in replies]
    assert cached == [0, 256]

    def grown(name, **labels):
        key = (f"rewardserve_{name}", tuple(sorted(labels.items())))
        return server.metrics().get(key, 0.0) - before.get(key, 0.0)

    kit.until(lambda: grown("batch_pairs_sum") == 4)
    assert grown("prefix_cache_tokens_total", result="hit") == 256
    assert grown("prefix_cache_tokens_total", result="miss") == 2 * 300 - 256
    assert grown("pairs_total") == 4
    assert grown("item_failures_total", code="INVALID_ARGUMENT") == 2
    assert grown("batch_tokens_sum") >= 309 + 53
    for reply in replies:
        assert reply.timings.compute_s > 0 and reply.timings.queue_s >= 0
    assert server.metric("in_flight_requests") == server.metric("in_flight_tokens") == 0
