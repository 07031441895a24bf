"""What is loaded is the checkpoint, every weight of it, and it scores as padded Hugging Face does by true length."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import COMMON, padded_scores
from rewardserve.errors import LoadFailed
from rewardserve.models.loader import choose_device, choose_dtype, load
from rewardserve.models.spec import read_spec
from safetensors.torch import load_file, save_file
from scoring import native
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAD = 0  # of the tiny checkpoints
ROWS = [[5, 6, 7, 8], [9, 10], [11, PAD], [12, 13, PAD, PAD], [PAD, 14, PAD], [PAD]]


def scores(folder: Path, rows=ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return load(read_spec(str(folder)), dtype, CPU).features_padded(
        [torch.tensor(row) for row in rows], [[len(row) - 1] for row in rows]
    )[:, 0]


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def refusal(folder: Path) -> str:
    with pytest.raises(LoadFailed) as refused:
        load(read_spec(str(folder)), torch.float32, CPU)
    return str(refused.value)


def test_a_checkpoint_in_one_file_scores_as_hugging_face(folder) -> None:
    assert close(scores(folder.path), padded_scores(folder.path, ROWS, torch.float32))


@pytest.mark.parametrize("of_today", [True, False])
def test_torchs_own_file_scores_as_hugging_face_in_either_of_its_forms(folder, of_today: bool) -> None:
    wanted = padded_scores(folder.path, ROWS, torch.float32)
    file = folder.path / "pytorch_model.bin"
    torch.save(load_file(folder.weights), file, _use_new_zipfile_serialization=of_today)
    folder.weights.unlink()
    assert close(scores(folder.path), wanted)


def test_a_checkpoint_in_shards_scores_the_same(folder, shards) -> None:
    assert torch.equal(scores(shards.path), scores(folder.path))


def test_head_and_backbone_come_from_the_files_that_hugging_face_reads(folder, shards) -> None:
    """Where several sets of weights lie in one folder, others were left behind by what saved it first."""
    folder.reweigh(lambda w: w.update({key: tensor * 1.2 for key, tensor in w.items()}))
    shutil.copy(folder.weights, shards.path)
    torch.save({key: torch.zeros(1) for key in load_file(folder.weights)}, shards.path / "pytorch_model.bin")
    assert torch.equal(scores(shards.path), scores(folder.path))
    assert close(scores(shards.path), padded_scores(shards.path, ROWS, torch.float32))


def test_the_backbones_prefix_may_be_absent(folder, pristine: Path) -> None:
    folder.rename(lambda key: key.removeprefix("model."))
    assert torch.equal(scores(folder.path), scores(pristine))


def test_a_bias_is_added(folder, pristine: Path) -> None:
    folder.reweigh(lambda w: w.update({"score.bias": torch.tensor([2.5])}))
    assert close(scores(folder.path), scores(pristine) + 2.5)


@pytest.mark.parametrize(
    "key",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_norm.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_missing_weight_is_named_not_made_up(folder, key: str, prefix: str) -> None:
    folder.reweigh(lambda w: w.pop(key))
    folder.rename(lambda k: prefix + k.removeprefix("model.") if k.startswith("model.") else k)
    assert key.removeprefix("model.") in refusal(folder.path)


def test_a_whole_missing_layer_is_noticed(folder) -> None:
    def drop_layer(weights) -> None:
        for key in [key for key in weights if ".layers.2." in key]:
            del weights[key]

    folder.reweigh(drop_layer)
    assert "layers.2." in refusal(folder.path)


def test_a_backbone_under_another_name_is_not_taken_for_random_weights(folder) -> None:
    folder.rename(lambda key: key.replace("model.", "mystery."))
    assert "missing" in refusal(folder.path)


@pytest.mark.parametrize("wrapper", ["transformer.", "pretrained_model.model.", "base_model.model.model."])
def test_the_names_that_wrappers_give_a_backbone_are_known(folder, pristine: Path, wrapper: str) -> None:
    folder.rename(lambda key: key.replace("model.", wrapper))
    assert torch.equal(scores(folder.path), scores(pristine))


def reshape_up_projection(weights) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)


def test_a_weight_of_the_wrong_shape_is_refused_by_name(folder) -> None:
    folder.reweigh(reshape_up_projection)
    assert "layers.1.mlp.up_proj.weight" in refusal(folder.path)


def test_an_unknown_activation_is_named_with_its_key(folder) -> None:
    folder.configure(hidden_act="nope")
    assert "hidden_act" in refusal(folder.path) or "config" in refusal(folder.path)


def test_a_quantization_whose_library_is_missing_is_refused(folder) -> None:
    folder.configure(quantization_config={"quant_method": "awq", "bits": 4})
    assert "quant" in refusal(folder.path) or "AWQ" in refusal(folder.path)


def test_eight_bits_that_only_a_file_of_modelopt_tells_of_are_refused(folder) -> None:
    def quantize(weights) -> None:
        for key in [key for key in weights if key.endswith("proj.weight")]:
            scale = weights[key].abs().amax() / 448
            weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
            weights[f"{key}_scale"] = scale

    folder.reweigh(quantize)
    (folder.path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert "hf_quant_config.json" in refusal(folder.path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_head_in_eight_bits_is_refused(folder, dtype: torch.dtype) -> None:
    """Its scale lies elsewhere, and is not applied here."""

    def quantize(weights) -> None:
        scale = weights["score.weight"].abs().amax() / 100
        weights |= {"score.weight": (weights["score.weight"] / scale).to(dtype), "score.weight_scale": scale}

    folder.reweigh(quantize)
    message = refusal(folder.path)
    assert "'score.weight'" in message and "8 bits" in message


def test_surplus_weights_are_said_and_change_nothing(folder, pristine: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.reweigh(lambda w: w.update({"value_head.weight": torch.ones(3)}))
    assert torch.equal(scores(folder.path), scores(pristine))
    assert "value_head.weight" in caplog.text and "score.weight" not in caplog.text


def test_of_a_head_and_a_value_head_beside_the_model_it_is_said_which_is_read(folder, pristine: Path, caplog) -> None:
    file = folder.path / "value_head.safetensors"
    save_file({"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.zeros(1)}, file)
    assert torch.equal(scores(folder.path), scores(pristine))
    assert "its head is score.weight, and the one in value_head.safetensors is not used" in caplog.text
    caplog.clear()
    folder.reweigh(lambda w: w.pop("score.weight"))
    scores(folder.path)
    assert not caplog.text


@pytest.mark.parametrize("prefix", ["model.", "transformer."])
@pytest.mark.parametrize("key", ["layers.1.self_attn.q_proj.bias", "layers.3.mlp.up_proj.weight", "norm.bias"])
def test_weights_of_the_backbone_that_the_config_knows_nothing_of_are_refused(folder, key: str, prefix: str) -> None:
    """Hugging Face computes without them."""
    folder.rename(lambda name: name.replace("model.", prefix))
    folder.reweigh(lambda w: w.update({prefix + key: torch.ones(64)}))
    message = refusal(folder.path)
    assert key in message and "config.json describes a model without" in message


def test_what_stands_between_backbone_and_head_is_refused_until_it_is_told(folder, pristine: Path) -> None:
    folder.reweigh(lambda w: w.update({"head.dense.weight": torch.ones(64, 64)}))
    message = refusal(folder.path)
    assert "head.dense.weight" in message and "rewardserve.toml" in message
    (folder.path / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "score"\n')
    assert torch.equal(scores(folder.path), scores(pristine))


def test_a_decoder_whose_class_transforms_what_it_classifies_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("modernbert-decoder", **COMMON)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert "head.dense.weight" in refusal(tmp_path)


def test_buffers_that_older_versions_saved_are_no_weights(folder, pristine: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(8)}
    folder.reweigh(lambda w: w.update(old))
    assert torch.equal(scores(folder.path), scores(pristine))


def test_a_response_that_ends_in_the_pad_id_is_scored_there(folder) -> None:
    """Hugging Face's own head looks for the last token that is not padding and scores another one."""
    got = scores(folder.path)
    assert close(got, padded_scores(folder.path, ROWS, torch.float32))
    model = AutoModelForSequenceClassification.from_pretrained(folder.path, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs = model(input_ids=torch.tensor([[11, PAD]])).logits[0, 0]
    assert not torch.allclose(theirs, got[2], atol=1e-3), "this checkpoint does not tell the two apart"


def test_a_score_does_not_depend_on_the_padding_beside_it(folder) -> None:
    together = scores(folder.path)
    for row, score in zip(ROWS, together, strict=True):
        assert close(scores(folder.path, [row]), score[None])


async def test_the_engine_scores_a_pad_id_at_the_end_as_a_token_on_both_paths(folder) -> None:
    groups = [([5, 6, PAD], [[7, PAD], [PAD], [7, PAD, PAD], [7]]), ([PAD], [[PAD]])]
    rows = [[*prompt, *response] for prompt, responses in groups for response in responses]
    wanted = padded_scores(folder.path, rows, torch.float32)
    for path in ("packed", "padded"):
        async with native(folder.path, path=path) as scorer:
            assert close(await scorer.scores(groups), wanted), path


def test_scores_are_fp32_whatever_the_backbones_precision(folder) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert scores(folder.path, dtype=dtype).dtype is torch.float32


def test_a_norm_that_stands_before_the_layers_as_well_gives_them_their_precision(tmp_path: Path) -> None:
    config = AutoConfig.for_model("nanochat", **COMMON)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "rewardserve.toml").write_text('[head]\nkind = "lm_rows"\nids = [30]\n')
    wanted = [model(input_ids=torch.tensor([row])).logits[0, -1, 30].item() for row in ROWS]
    exact, rounded = scores(tmp_path), scores(tmp_path, dtype=torch.bfloat16)
    assert exact.tolist() == pytest.approx(wanted, abs=1e-5)
    assert rounded.tolist() == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("asked", "stored", "device", "chosen"),
    [
        ("auto", torch.float32, CPU, torch.float32),
        ("auto", torch.bfloat16, CPU, torch.bfloat16),
        ("auto", torch.float16, CPU, torch.float32),
        ("auto", torch.float16, CUDA, torch.float16),
        ("auto", torch.bfloat16, CUDA, torch.bfloat16),
        ("auto", torch.float64, CPU, torch.float32),
        ("float16", torch.float32, CPU, torch.float16),
        ("float32", torch.bfloat16, CUDA, torch.float32),
        ("bfloat16", torch.float16, CPU, torch.bfloat16),
    ],
)
def test_the_precision_is_the_one_asked_for_or_the_checkpoints_own(pristine, asked, stored, device, chosen) -> None:
    spec = dataclasses.replace(read_spec(str(pristine)), stored_dtype=stored)
    assert choose_dtype(asked, spec, device) is chosen


def test_auto_is_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == kind
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("device", ["tpu9", "", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(LoadFailed, match=f"'{device}'"):
        choose_device(device)
