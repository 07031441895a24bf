"""One real server, from text to score and from request to metric."""

import math
import time

import checkpoints
import grpc
import pytest
import torch
from rewardserve.v1 import models_pb2, scoring_pb2
from transformers import AutoTokenizer

Prompt, Response, Group = scoring_pb2.Prompt, scoring_pb2.Response, scoring_pb2.Group


@pytest.fixture(scope="module")
def server(start, checkpoint):
    return start("--model", f"tiny={checkpoint}").ready()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def ids_of(tokenizer, messages, generate) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turn(role, content):
    return {"role": role, "content": content}


def conversation_before(prompt):
    return [turn("system", "Be brief."), turn("user", "Hi!"), turn("assistant", "Hello."), turn("user", prompt)]


def as_text(tokenizer, prompt, responses):
    rows = [ids_of(tokenizer, [turn("user", prompt), turn("assistant", r)], False) for r in responses]
    return Prompt(text=prompt), [Response(text=r) for r in responses], rows


def as_conversation(tokenizer, prompt, responses):
    messages = conversation_before(prompt)
    rows = [ids_of(tokenizer, [*messages, turn("assistant", r)], False) for r in responses]
    sent = scoring_pb2.Conversation(messages=[scoring_pb2.ChatMessage(**message) for message in messages])
    return Prompt(conversation=sent), [Response(text=r) for r in responses], rows


def as_rendered(tokenizer, prompt, responses):
    text = tokenizer.apply_chat_template([turn("user", prompt)], tokenize=False, add_generation_prompt=True)
    rows = [tokenizer(text + r, add_special_tokens=False)["input_ids"] for r in responses]
    return Prompt(rendered=text), [Response(text=r) for r in responses], rows


def as_ids(tokenizer, prompt, responses):
    def pack(ids):
        return torch.tensor(ids, dtype=torch.int32).numpy().astype("<i4").tobytes()

    head = ids_of(tokenizer, [turn("user", prompt)], True)
    tails = [tokenizer(r + "<|im_end|>", add_special_tokens=False)["input_ids"] for r in responses]
    return Prompt(token_ids=pack(head)), [Response(token_ids=pack(t)) for t in tails], [[*head, *t] for t in tails]


@pytest.mark.parametrize("make", [as_text, as_conversation, as_rendered, as_ids])
def test_scores_agree_with_padded_hugging_face(server, kit, checkpoint, tokenizer, real_groups, make):
    groups, rows = [], []
    for prompt, responses in real_groups[:4]:
        sent, responses_, ids = make(tokenizer, prompt, responses)
        groups.append(Group(prompt=sent, responses=responses_))
        rows += ids
    reply = server.scoring.Score(scoring_pb2.ScoreRequest(groups=groups), timeout=kit.ANTI_HANG_S)
    items = [item for group in reply.groups for item in group.items]
    assert [item.num_prompt_tokens + item.num_response_tokens for item in items] == [len(row) for row in rows]
    wanted = checkpoints.padded_scores(checkpoint, rows, torch.float32)
    torch.testing.assert_close(torch.tensor([item.score for item in items]), wanted, rtol=1e-4, atol=1e-4)
    assert {item.kind for item in items} == {scoring_pb2.SCORE_KIND_RAW_LOGIT}


def test_the_same_request_has_the_same_scores_bit_by_bit_and_finds_its_prompt_cached(server, kit):
    request = kit.ids_request(kit.random_ids(50, 400), [kit.random_ids(51 + i, 30) for i in range(5)])
    first, second = (server.scoring.Score(request, timeout=kit.ANTI_HANG_S) for _ in range(2))
    assert kit.scores_of(first) == kit.scores_of(second)
    assert {item.num_cached_tokens for item in first.groups[0].items} == {0}
    assert all(item.num_cached_tokens >= 256 for item in second.groups[0].items)


def test_truncation_down_to_no_prompt_at_all_is_still_scored(server, kit, checkpoint):
    """max_length is 2048: of 5 + 2048 tokens the prompt is cut off whole."""
    response = kit.random_ids(60, 2048)
    options = scoring_pb2.ScoreOptions(overflow=scoring_pb2.OVERFLOW_TRUNCATE_PROMPT_LEFT)
    reply = server.scoring.Score(kit.ids_request([5] * 5, [response, [7]], options=options), timeout=kit.ANTI_HANG_S)
    cut, whole = reply.groups[0].items
    assert (cut.truncated, cut.num_prompt_tokens, cut.num_response_tokens) == (True, 0, 2048)
    wanted = checkpoints.padded_scores(checkpoint, [response, [5] * 5 + [7]], torch.float32)
    torch.testing.assert_close(torch.tensor([cut.score, whole.score]), wanted, rtol=1e-4, atol=1e-4)


def test_rank_and_compare_agree_with_score(server, kit, real_groups):
    prompt, responses = real_groups[0]
    sent, texts = Prompt(text=prompt), [Response(text=text) for text in responses]
    reply = server.scoring.Score(scoring_pb2.ScoreRequest(groups=[Group(prompt=sent, responses=texts)]), timeout=60)
    scores = kit.scores_of(reply)
    ranking = server.scoring.Rank(scoring_pb2.RankRequest(prompt=sent, responses=texts, top_k=2), timeout=60)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:2]
    assert [e.index for e in ranking.ranked] == best
    assert [e.item.score for e in ranking.ranked] == pytest.approx([scores[i] for i in best], rel=1e-4)
    pair = scoring_pb2.CompareRequest(prompt=sent, response_a=texts[0], response_b=texts[1])
    comparison = server.scoring.Compare(pair, timeout=60)
    assert comparison.margin == comparison.a.score - comparison.b.score
    assert [comparison.a.score, comparison.b.score] == pytest.approx(scores[:2], rel=1e-4)
    assert comparison.probability_a == pytest.approx(1 / (1 + math.exp(-comparison.margin)))


def settled(server):
    """Metrics that no report of an earlier forward will change any more: those come after the reply."""
    seen = server.metrics()
    while True:
        time.sleep(0.3)
        before, seen = seen, server.metrics()
        if before == seen:
            return seen


def test_metrics_agree_with_what_was_sent(server, kit):
    prompt = kit.random_ids(70, 300)
    request = kit.ids_request(prompt, [kit.random_ids(71, 9), [], [5] * 3000, kit.random_ids(72, 4)])
    before = settled(server)
    replies = [server.scoring.Score(request, timeout=kit.ANTI_HANG_S) for _ in range(3)]
    for bad in (kit.ids_request([], [[1]]), kit.ids_request([1], [[400]])):
        with pytest.raises(grpc.RpcError):
            server.scoring.Score(bad, timeout=kit.ANTI_HANG_S)
    with pytest.raises(grpc.RpcError):
        server.scoring.Score(kit.ids_request([1], [[1]], model="unknown"), timeout=kit.ANTI_HANG_S)
    cached = [reply.groups[0].items[0].num_cached_tokens for reply in replies]

    def grown(name, **labels):
        key = (f"rewardserve_{name}", tuple(sorted(labels.items())))
        return server.metrics().get(key, 0.0) - before.get(key, 0.0)

    kit.until(lambda: grown("prefix_cache_tokens_total", result="hit") == sum(cached))
    assert cached[0] == 0 and cached[2] >= 256
    assert grown("prefix_cache_tokens_total", result="miss") == 3 * 300 - sum(cached)
    assert grown("requests_total", status="OK") == 3
    assert grown("requests_total", status="INVALID_ARGUMENT") == 2
    assert grown("pairs_total") == 6
    assert grown("tokens_total") == 3 * (309 + 304)
    assert grown("item_failures_total", code="INVALID_ARGUMENT") == 3
    assert grown("item_failures_total", code="OUT_OF_RANGE") == 3
    scores = [score for reply in replies for score in kit.scores_of(reply) if score is not None]
    for edge in ("-1.0", "0.0", "5.0", "+Inf"):
        assert grown("score_bucket", le=edge) == sum(score <= float(edge) for score in scores)
    for stage in ("admission", "tokenization", "queue", "compute", "total"):
        assert grown("stage_seconds_count", stage=stage) == 3
        told = sum(getattr(reply.timings, f"{stage}_s") for reply in replies)
        assert grown("stage_seconds_sum", stage=stage) == pytest.approx(told, rel=1e-3, abs=1e-6)
    assert grown("batch_pairs_sum") == 6
    (version,) = {reply.model.version for reply in replies}
    labels = {"architecture": "Qwen3ForSequenceClassification", "path": "packed", "dtype": "float32"}
    assert server.metric("model_info", version=version, **labels) == 1
    assert server.metric("model_up") == 1
    assert server.metric("engine_restarts_total") == 0
    assert server.metric("in_flight_requests") == server.metric("in_flight_tokens") == 0


def test_get_tells_what_was_loaded(server, checkpoint, kit):
    model = server.model("tiny")
    reply = server.scoring.Score(kit.ids_request([1], [[1]]), timeout=kit.ANTI_HANG_S)
    assert (reply.model.name, reply.model.version) == ("tiny", model.version) and len(model.version) >= 8
    assert (model.name, model.source, model.message) == ("tiny", str(checkpoint), "")
    assert model.state == models_pb2.MODEL_STATE_SERVING
    assert model.architecture == "Qwen3ForSequenceClassification"
    assert (model.path, model.path_reason) == (models_pb2.EXECUTION_PATH_PACKED, "")
    assert (model.dtype, model.device) == ("float32", "cpu")
    assert (model.max_length, model.vocab_size) == (2048, checkpoints.VOCAB_SIZE)
    assert model.num_parameters == sum(p.numel() for p in checkpoints.make_model("qwen3").parameters())
    assert (model.has_tokenizer, model.has_chat_template, model.prompt_tokenized_once) == (True, True, True)
    assert 0 <= model.canary_error < 1e-3
    assert model.num_restarts == 0 and model.prefix_cache_tokens > 2048


def test_only_the_engine_has_loaded_torch(server):
    def mapped(process):
        return {m.path.rsplit("/", 1)[-1] for m in process.memory_maps(grouped=True)}

    assert not any(name.startswith("libtorch") for name in mapped(server.front))
    assert any(name.startswith("libtorch") for name in mapped(server.engine()))
