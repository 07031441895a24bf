"""Left to choose, the server gives vLLM what the native engine cannot load, and says why."""

import json

import checkpoints
import pytest
import torch
from rewardserve.engine.vllm_load import _arguments, quantization_of
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.models.spec import read_spec
from rewardserve.v1 import models_pb2
from safetensors.torch import load_file, save_file

VLLM = models_pb2.EXECUTION_PATH_VLLM
GROUP = 32  # weights that share a scale
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the eight weights in an int32, as AWQ packs them


def pack(weights: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 0..15 -> [rows, columns / 8] int32."""
    eights = weights.reshape(len(weights), -1, 8)[:, :, ORDER].to(torch.int64)
    packed = sum(eights[:, :, i] << (4 * i) for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def save_awq(exact, quantized) -> None:
    """The same random model twice: in 4 bits as AWQ stores it, and in fp32."""
    checkpoints.save_checkpoint(exact, "llama", head_dim=32)
    fp32 = load_file(exact / "model.safetensors")
    awq = {}
    generator = torch.Generator().manual_seed(0)
    for key, weight in fp32.items():
        if not key.endswith("proj.weight"):
            awq[key] = weight.half()
            fp32[key] = awq[key].float()
            continue
        rows, columns = weight.shape
        integers = torch.randint(0, 16, (columns, rows), generator=generator)
        scales = (0.02 + 0.02 * torch.rand((columns // GROUP, rows), generator=generator)).half()
        fp32[key] = ((integers - 8) * scales.float().repeat_interleave(GROUP, 0)).T.contiguous()
        name = key.removesuffix("weight")
        zeros = torch.full((columns // GROUP, rows), 8)
        awq |= {f"{name}qweight": pack(integers), f"{name}qzeros": pack(zeros), f"{name}scales": scales}
    save_file(fp32, exact / "model.safetensors", metadata={"format": "pt"})
    save_file(awq, quantized / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    config = json.loads((exact / "config.json").read_text()) | {"dtype": "float16", "quantization_config": method}
    (quantized / "config.json").write_text(json.dumps(config))


@pytest.fixture
def rows(kit):
    prompt = kit.random_ids(1, 300)
    return prompt, [kit.random_ids(2 + i, length) for i, length in enumerate((1, 20, 200, 64, 5, 33))]


def score(server, kit, rows):
    reply = server.scoring.Score(kit.ids_request(*rows), timeout=kit.ANTI_HANG_S)
    return torch.tensor(kit.scores_of(reply))


def exact_scores(folder, rows):
    prompt, responses = rows
    return checkpoints.padded_scores(folder, [prompt + response for response in responses], torch.float32)


def test_a_checkpoint_in_four_bits_is_given_to_vllm_and_scored_right(start, kit, tmp_path, rows):
    exact, quantized = tmp_path / "exact", tmp_path / "quantized"
    exact.mkdir()
    quantized.mkdir()
    save_awq(exact, quantized)
    server = start("--model", f"m={quantized}").ready()
    model = server.model()
    assert model.path == VLLM and model.dtype == "awq" and model.version.endswith("-awq-vllm")
    assert "the native engine cannot load it" in model.path_reason and "AWQ" in model.path_reason
    wanted = exact_scores(exact, rows)
    worst = ((score(server, kit, rows) - wanted).abs().max() / wanted.abs().max()).item()
    print(f"AWQ: largest difference to the same weights in fp32 {worst:.1e} of the largest score")
    assert worst <= 0.02, "what is computed in half precision rounds, but this is another model"


def test_a_model_over_two_ranks_gives_the_same_scores(start, kit, checkpoint, rows):
    server = start("--model", f"m={checkpoint}", "--tensor-parallel", "2").ready()
    model = server.model()
    assert (model.path, model.path_reason, model.device) == (VLLM, "tensor_parallel = 2", "cpu x 2")
    wanted = exact_scores(checkpoint, rows)
    worst = ((score(server, kit, rows) - wanted).abs().max() / wanted.abs().max()).item()
    print(f"two ranks: largest difference {worst:.1e} of the largest score")
    assert worst <= 1e-4


def test_left_to_choose_it_takes_the_native_engine_where_that_can(start, kit, checkpoint):
    assert start("--model", f"m={checkpoint}").ready().model().path == models_pb2.EXECUTION_PATH_PACKED


def test_where_neither_can_both_reasons_are_said(start, tmp_path):
    checkpoints.save_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    method = {"quant_method": "of no kind"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": method}))
    server = start("--model", f"m={tmp_path}")
    assert server.wait() == 1
    native, _, vllm = server.log[-1].partition("nor can vLLM")
    assert "'of no kind' is unknown" in native and "of no kind" in vllm


def test_a_device_that_this_vllm_is_not_for_is_named(start, checkpoint):
    server = start("--model", f"m={checkpoint}", "--engine", "vllm", "--device", "cuda")
    assert server.wait() == 1
    assert "device = cuda" in server.log[-1] and "for cpu" in server.log[-1]


@pytest.mark.parametrize("method", ["fp8", "fp8_per_channel", "mxfp8"])
def test_quantizing_as_it_loads_leaves_the_head_alone(tmp_path, method):
    """Its output would be rounded to half precision, and the score is to be the raw number in fp32."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.linear import ReplicatedLinear

    checkpoints.save_checkpoint(tmp_path, dtype=torch.bfloat16)
    options = VllmOptions(str(tmp_path), quantization=method)
    told = quantization_of(options, read_spec(str(tmp_path)))
    arguments = AsyncEngineArgs(str(tmp_path), runner="pooling", skip_tokenizer_init=True, **told)
    quantized = arguments.create_engine_config().quant_config.resolve_quant_method_cls
    assert quantized(ReplicatedLinear, "model.layers.0.mlp.down_proj") is not None
    assert quantized(ReplicatedLinear, "score") is None


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
STORED = {
    "by transformers": {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": None},
    "by llm-compressor": {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": WEIGHTS}},
    },
}


@pytest.mark.parametrize("told", STORED.values(), ids=STORED)
def test_the_head_of_a_checkpoint_in_eight_bits_is_read_as_it_is_stored(tmp_path, told):
    """In full, though the config does not say so: transformers quantizes no head."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    checkpoints.save_checkpoint(tmp_path, dtype=torch.bfloat16)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": told}))
    spec = read_spec(str(tmp_path))
    config = _arguments(VllmOptions(str(tmp_path)), spec, 1, spec.max_length).create_engine_config()
    layer = ReplicatedLinear.__new__(ReplicatedLinear)
    names = ["model.layers.0.mlp.down_proj", "score"]
    with set_current_vllm_config(config):
        methods = [config.quant_config.get_quant_method(layer, name) for name in names]
    assert [isinstance(method, UnquantizedLinearMethod) for method in methods] == [False, True]
