"""The output folder: complete, as its base was where nothing was trained, and the same numbers as in training."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from preferences import material_of, weights_of
from rewardserve.models.loader import load
from rewardserve.models.spec import read_spec
from rewardserve.training import member
from rewardserve.training.heads import MLP_KEYS
from rewardserve.training.recipe import Recipe
from rewardserve.training.save import TEXT_FILES, copy_text
from torch.nn.functional import relu
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

RECIPE = Recipe(max_steps=3, batch_size=4, learning_rate=1e-2, use_cpu=True)


def train(base, folder, recipe=RECIPE, **options):
    """(material, scores of the held-out responses in the trainer)"""
    material = material_of(base, **options)
    return material, torch.from_numpy(member.train_member(material, recipe, 0, folder).held_out_scores).float()


def last_states(model, rows):
    with torch.inference_mode():
        states = [model(input_ids=torch.tensor([row.tolist()])).last_hidden_state[0, -1] for row in rows]
    return torch.stack(states).float()


@pytest.mark.parametrize(
    ("change", "options"),
    [({}, {}), ({"head": "mlp"}, {}), ({"lora_rank": 4}, {}), ({"lora_rank": 4}, {"as_adapter": True})],
    ids=["whole", "mlp", "merged", "adapter"],
)
def test_serving_loads_it_and_scores_as_the_trainer_did(causal_base, tmp_path, change, options):
    material, scores = train(causal_base, tmp_path / "out", replace(RECIPE, **change), **options)
    model = load(read_spec(str(tmp_path / "out")), torch.float32, torch.device("cpu"))
    rows = [torch.tensor(ids.tolist()) for ids in material.held_out.ids]
    served = model.features_padded(rows, [[len(row) - 1] for row in rows])[:, 0]
    torch.testing.assert_close(served, scores, rtol=1e-5, atol=1e-5)


def test_it_is_a_plain_checkpoint_of_transformers(causal_base, tmp_path):
    material, scores = train(causal_base, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["Qwen3ForSequenceClassification"] and config.num_labels == 1
    assert config.id2label == {0: "reward"}
    assert config.pad_token_id == AutoConfig.from_pretrained(causal_base).pad_token_id
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    states = last_states(model.model, material.held_out.ids)
    torch.testing.assert_close((states @ model.score.weight.T)[:, 0], scores, rtol=1e-5, atol=1e-5)


def test_which_token_pads_is_as_in_the_base_though_training_took_another(causal_base, tmp_path):
    base = shutil.copytree(causal_base, tmp_path / "base")
    settings = base / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|pad|>", "<|im_end|>"))
    trainer = member.make_trainer(member.prepare(base, RECIPE, 0), material_of(base), RECIPE, 0, tmp_path / "scratch")
    train(base, tmp_path / "out")
    written = AutoConfig.from_pretrained(tmp_path / "out").pad_token_id
    assert written == AutoConfig.from_pretrained(base).pad_token_id != trainer.model.config.pad_token_id


def test_tokenizer_and_template_are_the_bases_byte_by_byte(causal_base, tmp_path):
    train(causal_base, tmp_path / "out")
    files = [file for pattern in TEXT_FILES for file in causal_base.glob(pattern)]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {file.name for file in files}
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_called_tokenizer_beside_a_base_is_not_copied(tmp_path):
    for name in ("base", "base/tokenizer", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    copy_text(tmp_path / "base", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]


def test_nothing_of_the_run_is_left_beside_the_model(causal_base, tmp_path):
    train(causal_base, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {file.name for file in causal_base.iterdir()} - {"generation_config.json"}


def test_an_mlp_head_has_its_four_weights_and_says_so(causal_base, tmp_path):
    """What a server needs to rebuild it: the keys, and the kind in config.json."""
    material, scores = train(causal_base, tmp_path / "out", replace(RECIPE, head="mlp"))
    weights = weights_of(tmp_path / "out")
    assert {key for key in weights if key.startswith("score")} == set(MLP_KEYS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["rewardserve"] == {"head": "mlp"}
    w0, b0, w2, b2 = (weights[key] for key in MLP_KEYS)
    states = last_states(AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32), material.held_out.ids)
    plain = relu(states @ w0.T + b0) @ w2.T + b2
    torch.testing.assert_close(plain[:, 0], scores, rtol=1e-5, atol=1e-5)


def test_a_trained_mlp_head_can_be_trained_on(causal_base, tmp_path):
    recipe = replace(RECIPE, head="mlp")
    train(causal_base, tmp_path / "first", recipe)
    went_on = member.prepare(tmp_path / "first", recipe, seed=1)
    weights = weights_of(tmp_path / "first")
    for key in MLP_KEYS:
        assert torch.equal(went_on.state_dict()[key], weights[key])


def test_a_linear_head_in_place_of_an_mlp_is_a_plain_checkpoint_again(causal_base, tmp_path):
    train(causal_base, tmp_path / "mlp", replace(RECIPE, head="mlp"))
    train(tmp_path / "mlp", tmp_path / "linear", replace(RECIPE, new_head=True))
    assert "rewardserve" not in json.loads((tmp_path / "linear" / "config.json").read_text())
    assert weights_of(tmp_path / "linear")["score.weight"].shape == (1, 32)


def test_an_adapter_is_pefts_own_and_gives_the_trainers_scores(causal_base, tmp_path):
    recipe = replace(RECIPE, lora_rank=4, open_layers=1)
    material, scores = train(causal_base, tmp_path / "out", recipe, as_adapter=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (tmp_path / "out" / config["base_model_name_or_path"]).resolve() == causal_base.resolve()
    assert (config["r"], config["task_type"], config["layers_to_transform"]) == (4, "SEQ_CLS", [2])
    assert "score" in config["modules_to_save"]
    assert config["target_modules"] == sorted(config["target_modules"])
    base = AutoModelForSequenceClassification.from_pretrained(causal_base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval().base_model.model
    with torch.inference_mode():
        states = last_states(model.model, material.held_out.ids)
        torch.testing.assert_close(model.score(states)[:, 0], scores, rtol=1e-5, atol=1e-5)


def test_merged_or_as_adapter_it_is_one_model(causal_base, tmp_path):
    recipe = replace(RECIPE, lora_rank=4)
    _, merged = train(causal_base, tmp_path / "merged", recipe)
    _, apart = train(causal_base, tmp_path / "apart", recipe, as_adapter=True)
    assert torch.equal(merged, apart)
    assert "lora" not in " ".join(weights_of(tmp_path / "merged"))


def test_in_16_bits_the_head_stays_in_32(causal_base, tmp_path):
    material = replace(material_of(causal_base), dtype=torch.bfloat16)
    member.train_member(material, replace(RECIPE, half=True), 0, tmp_path / "out")
    weights = weights_of(tmp_path / "out")
    assert weights.pop("score.weight").dtype is torch.float32
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert read_spec(str(tmp_path / "out")).stored_dtype is torch.bfloat16
