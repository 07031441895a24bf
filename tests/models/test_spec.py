"""A checkpoint is understood, or refused by name of what is wrong with it; never anything else."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB_SIZE, save_checkpoint
from rewardserve.errors import LoadFailed
from rewardserve.models.heads import LinearHead
from rewardserve.models.spec import ModelSpec, read_spec
from rewardserve.models.text_export import export_text
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

HIDDEN = 64


def head_of(spec: ModelSpec) -> LinearHead:
    assert isinstance(spec.recipe.head, LinearHead)
    return spec.recipe.head


def refusal(folder: Path | str) -> str:
    with pytest.raises(LoadFailed) as refused:
        read_spec(str(folder))
    return str(refused.value)


def test_one_file_says_it_all(folder) -> None:
    spec = read_spec(str(folder.path))
    assert spec.folder == folder.path and spec.weight_files == (folder.weights,)
    assert spec.architecture == "Qwen3ForSequenceClassification"
    assert head_of(spec).weight.shape == (1, HIDDEN) and head_of(spec).weight.dtype is torch.float32
    assert head_of(spec).bias is None
    assert spec.stored_dtype is torch.float32
    assert spec.max_length == 2048 and spec.config.get_text_config().vocab_size == VOCAB_SIZE


def test_several_files_hold_the_same_head(folder, shards) -> None:
    spec = read_spec(str(shards.path))
    assert len(spec.weight_files) > 2 and list(spec.weight_files) == sorted(spec.weight_files)
    assert torch.equal(head_of(spec).weight, head_of(read_spec(str(folder.path))).weight)


def test_a_head_with_a_bias_keeps_it_in_fp32(folder) -> None:
    folder.reweigh(lambda w: w.update({"score.bias": torch.tensor([0.5], dtype=torch.bfloat16)}))
    spec = read_spec(str(folder.path))
    bias = head_of(spec).bias
    assert bias is not None and bias.dtype is torch.float32 and bias.tolist() == [0.5]


def test_a_head_in_another_precision_does_not_decide_the_backbones(folder) -> None:
    folder.reweigh(lambda w: w.update({key: t.bfloat16() for key, t in w.items() if key != "score.weight"}))
    spec = read_spec(str(folder.path))
    assert spec.stored_dtype is torch.bfloat16 and head_of(spec).weight.dtype is torch.float32


def test_a_missing_head_is_named_with_the_keys_that_could_be_it(folder) -> None:
    folder.rename(lambda key: key.replace("score.weight", "score_of_mine.weight"))
    message = refusal(folder.path)
    assert "'score.weight'" in message and "score_of_mine.weight" in message and str(folder.path) in message


def test_a_language_models_checkpoint_is_no_reward_model(folder) -> None:
    def become_a_language_model(w) -> None:
        del w["score.weight"]
        w["lm_head.weight"] = torch.zeros(VOCAB_SIZE, HIDDEN)

    folder.reweigh(become_a_language_model)
    assert "lm_head.weight" in refusal(folder.path)


@pytest.mark.parametrize("shape", [(2, HIDDEN), (1, HIDDEN // 2), (HIDDEN, 1), (HIDDEN,), ()])
def test_a_head_of_another_shape_is_refused_with_both_shapes(folder, shape: tuple[int, ...]) -> None:
    folder.reweigh(lambda w: w.update({"score.weight": torch.zeros(shape)}))
    message = refusal(folder.path)
    assert "score.weight" in message and str(shape) in message and f"(1, {HIDDEN})" in message
    assert ("rewardserve.toml" in message) == (shape == (2, HIDDEN))  # as TRL's PRMTrainer and classifiers leave it


def test_a_bias_of_another_shape_is_refused(folder) -> None:
    folder.reweigh(lambda w: w.update({"score.bias": torch.zeros(2)}))
    assert "score.bias" in refusal(folder.path)


def test_a_missing_shard_is_named(shards) -> None:
    missing = sorted(shards.path.glob("model-*.safetensors"))[1]
    missing.unlink()
    assert missing.name in refusal(shards.path)


def test_no_safetensors_says_what_is_there_instead(folder) -> None:
    folder.weights.rename(folder.path / "model.gguf")
    message = refusal(folder.path)
    assert "model.safetensors" in message and "model.gguf" in message


def test_a_file_of_weights_that_is_none_is_named(folder) -> None:
    folder.weights.rename(folder.path / "pytorch_model.bin")
    assert "pytorch_model.bin: not a readable file of weights" in refusal(folder.path)


def test_a_file_of_weights_runs_no_code(folder) -> None:
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("it ran",))

    folder.weights.unlink()
    torch.save({"score.weight": Evil()}, folder.path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder.path)


@pytest.mark.parametrize("keep", [0, 4, 100, -100, -1])
def test_a_file_cut_short_is_named(folder, keep: int) -> None:
    folder.weights.write_bytes(folder.weights.read_bytes()[:keep])
    message = refusal(folder.path)
    assert str(folder.weights) in message and "download" in message


def test_a_shard_cut_short_is_named(shards) -> None:
    short = sorted(shards.path.glob("model-*.safetensors"))[-1]
    short.write_bytes(short.read_bytes()[:-10])
    assert short.name in refusal(shards.path)


def test_files_of_json_are_utf_8_whatever_the_locale_is(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a token that is told by its text is not found, and another one is read in its place."""
    config = json.loads(folder.config.read_text()) | {"note": "▁+"}
    for name, saved in (("config", config), ("tokenizer", {"model": {"vocab": {"▁+": 5}}})):
        (folder.path / f"{name}.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    opened = io.open
    monkeypatch.setattr(
        io,
        "open",
        lambda file, mode="r", buffering=-1, encoding=None, *rest: opened(
            file, mode, buffering, "ascii" if encoding in (None, "locale") and "b" not in mode else encoding, *rest
        ),
    )
    checkpoint = read_spec(str(folder.path)).checkpoint
    assert checkpoint.raw_config["note"] == "▁+" and checkpoint.token_id("▁+", 648) == 5


def test_no_config_is_named(folder) -> None:
    folder.config.unlink()
    assert "config.json" in refusal(folder.path)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\x00\x01", '{"architectures": []}', '{"model_type": "never_heard_of"}']
)
def test_a_config_that_says_nothing_is_named(folder, text: str) -> None:
    folder.config.write_text(text)
    assert "config.json" in refusal(folder.path)


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_encoder_decoders_are_refused_as_such(folder, kind: str) -> None:
    folder.configure(model_type=kind)
    assert "encoder-decoder" in refusal(folder.path)


def test_a_config_of_another_width_is_refused(folder) -> None:
    folder.configure(hidden_size=128)
    assert "(1, 128)" in refusal(folder.path)


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such", "../no/such", "no-such", "a/b/c", "~/no-such"])
def test_no_folder_and_no_hub_name_says_so(source: str) -> None:
    message = refusal(source)
    assert source in message and "no such folder" in message


def test_a_name_longer_than_the_system_takes_is_told_as_such(folder) -> None:
    for source in ("x" * 300, f"{folder.path}/{'x' * 300}"):
        message = refusal(source)
        assert source in message and "too long" in message


def test_a_hub_name_offline_says_that_the_hub_could_not_provide_it() -> None:
    message = refusal("some-organisation/some-model")
    assert "some-organisation/some-model" in message and "hub" in message
    assert "\n" not in message


def test_a_file_in_place_of_a_folder_is_refused(folder) -> None:
    assert str(folder.weights) in refusal(folder.weights)


def test_no_checkpoint_runs_its_own_code_or_asks_whether_it_may(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the server's terminal"))
    (folder.path / "evil.py").write_text("raise SystemExit('it ran')")
    folder.configure(auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    assert read_spec(str(folder.path)).architecture == "Qwen3ForSequenceClassification"


def test_an_unknown_kind_with_its_own_code_is_refused_without_asking(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(True) or "n")
    folder.configure(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    refusal(folder.path)
    assert not asked


def test_a_tokenizer_with_its_own_code_is_left_out_without_asking(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(True) or "n")
    (folder.path / "tokenizer.model").write_bytes(b"x")
    auto_map = {"AutoTokenizer": ["evil.T", None]}
    (folder.path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EvilT", "auto_map": auto_map}))
    text, reason = export_text(folder.path)
    assert text is None and reason
    assert not asked


BAD_INDEXES = ("{", "[" * 100_000, "[]", "{}", '{"weight_map": []}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}')


@pytest.mark.parametrize("text", BAD_INDEXES)
def test_a_broken_index_is_named(shards, text: str) -> None:
    shards.index.write_text(text)
    assert "index.json" in refusal(shards.path)


BAD_CONFIGS = {
    "a wrong type": {"hidden_size": "abc"},
    "a length that is none": {"max_position_embeddings": "long"},
    "too few layer types": {"num_hidden_layers": 5},
    "a dtype nobody has": {"dtype": "nope"},
    "another family's values": {"model_type": "mamba"},
    "a name that is none": {"architectures": [3]},
    "a name out of its list": {"architectures": "Qwen3ForSequenceClassification"},
}


@pytest.mark.parametrize("changes", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_with_wrong_values_is_named(folder, changes: dict) -> None:
    folder.configure(**changes)
    assert "config.json" in refusal(folder.path)


def test_what_is_wrong_with_a_value_is_told_with_its_key(folder) -> None:
    folder.configure(hidden_size="abc")
    assert "'hidden_size' expected int, got str" in refusal(folder.path)


def test_a_folder_in_the_place_of_the_config_is_named(folder) -> None:
    folder.config.unlink()
    folder.config.mkdir()
    assert "config.json" in refusal(folder.path)


@pytest.mark.parametrize("text", ["[]", '"text"', "3"])
def test_a_config_that_is_no_object_is_named(folder, text: str) -> None:
    folder.config.write_text(text)
    assert "config.json" in refusal(folder.path)


# -- versions ------------------------------------------------------------------------------------------------------


def version(folder: Path) -> str:
    return read_spec(str(folder)).version


def test_the_same_files_are_the_same_version_wherever_they_lie(folder, tmp_path: Path) -> None:
    copy = shutil.copytree(folder.path, tmp_path / "copy")
    assert version(folder.path) == version(copy)


def test_one_changed_byte_anywhere_is_another_version(folder) -> None:
    size = folder.weights.stat().st_size
    header = 8 + int.from_bytes(folder.weights.read_bytes()[:8], "little")
    versions = {version(folder.path)}
    offsets = [header, header + 1, 65_535, 65_536, 65_537, size // 2, size - 65_536, size - 1]
    for count, offset in enumerate(offsets, 2):
        folder.flip_byte(offset)  # flips pile up; any two states differ
        versions.add(version(folder.path))
        assert len(versions) == count, offset


@pytest.mark.parametrize("in_torchs_file", [False, True])
@pytest.mark.parametrize("key", ["score.weight", "model.layers.1.input_layernorm.weight"])
def test_in_a_large_file_too_a_head_or_a_norm_that_was_trained_is_another_version(
    folder, in_torchs_file: bool, key: str
) -> None:
    """Of files above 16 MiB only samples are read."""
    weights = load_file(folder.weights)
    weights["model.embed_tokens.weight"] = torch.zeros(200_000, HIDDEN)
    folder.configure(vocab_size=200_000)
    file = folder.path / "pytorch_model.bin" if in_torchs_file else folder.weights
    folder.weights.unlink()
    versions = set()
    for _ in range(2):
        weights[key][..., 0] += 1
        if in_torchs_file:
            torch.save(weights, file)
        else:
            save_file(weights, file, metadata={"format": "pt"})
        versions.add(version(folder.path))
    assert len(versions) == 2


def test_a_changed_config_is_another_version(folder) -> None:
    before = version(folder.path)
    folder.configure(rms_norm_eps=1e-3)
    assert version(folder.path) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_is_another_version(folder, name: str) -> None:
    (folder.path / name).write_text("{}")
    before = version(folder.path)
    (folder.path / name).write_text('{"changed": 1}')
    assert version(folder.path) != before


def test_a_folder_called_tokenizer_and_a_link_to_nowhere_are_no_files_of_it(folder) -> None:
    before = version(folder.path)
    (folder.path / "tokenizer").mkdir()
    (folder.path / "tokenizer.json").symlink_to("/nowhere")
    assert version(folder.path) == before


def test_a_file_that_goes_while_a_checkpoint_is_read_refuses_it(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else than LoadFailed would end an engine that is to take over these weights."""
    gone = folder.path / "vocab.json"
    monkeypatch.setattr("rewardserve.models.spec.fingerprint", lambda folders, files: gone.read_text())
    assert re.fullmatch(r".*vocab\.json: No such file or directory", refusal(folder.path))


def test_other_shards_are_another_version(shards) -> None:
    before = version(shards.path)
    first = sorted(shards.path.glob("model-*.safetensors"))[0]
    weights = load_file(first)
    key = next(iter(weights))
    weights[key].view(-1)[0] += 1
    save_file(weights, first, metadata={"format": "pt"})
    assert version(shards.path) != before


def test_versions_are_short_and_printable(folder) -> None:
    assert len(version(folder.path)) == 12 and version(folder.path).isalnum()


def test_the_longest_input_is_the_configs(folder) -> None:
    folder.configure(max_position_embeddings=77)
    assert read_spec(str(folder.path)).max_length == 77
    for no_limit in (0, -1):
        folder.configure(max_position_embeddings=no_limit)
        assert read_spec(str(folder.path)).max_length == 2048


def test_the_index_decides_which_files_are_read(shards) -> None:
    """A leftover shard, and torch's own file, beside them are not looked at."""
    for name in ("model-00009-of-00009.safetensors", "pytorch_model.bin"):
        (shards.path / name).write_bytes(b"left over")
    names = set(json.loads(shards.index.read_text())["weight_map"].values())
    assert {file.name for file in read_spec(str(shards.path)).weight_files} == names


def test_an_encoder_whose_layers_before_the_classifier_are_not_known_is_refused(tmp_path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(LoadFailed, match="BertForSequenceClassification computes before its classifier is not known"):
        read_spec(str(tmp_path))


@pytest.mark.parametrize(("kind", "words"), [("roberta", "before its classifier is not"), ("canine", "no vocab_size")])
def test_encoders_that_cannot_be_served_are_refused_as_such(tmp_path, kind: str, words: str) -> None:
    config = AutoConfig.for_model(
        kind, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert words in refusal(tmp_path)


def save_language_model(folder: Path) -> Path:
    """Of which only its name may tell that it is a reward model."""
    save_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_nemotron_that_is_asked_about_a_principle_is_not_read_as_those_that_are_not(tmp_path) -> None:
    for name, refused in (("Llama-3.3-Nemotron-70B-Reward", False), ("Llama-3.3-Nemotron-70B-Reward-Principle", True)):
        folder = save_language_model(tmp_path / name)
        if refused:
            assert "no scalar head" in refusal(folder)
        else:
            assert read_spec(str(folder)).recipe.family == "Nemotron"


def test_a_revision_in_the_hubs_cache_has_the_name_of_its_model(tmp_path) -> None:
    """Where nothing can be downloaded, it is what is given."""
    model = "models--nvidia--Llama-3.1-Nemotron-70B-Reward-HF"
    save_language_model(tmp_path / model / "snapshots" / "031d8b1")
    assert read_spec(str(tmp_path / model / "snapshots" / "031d8b1")).recipe.family == "Nemotron"
    assert "no scalar head" in refusal(save_language_model(tmp_path / model / "others" / "031d8b1"))


def test_a_head_that_is_there_counts_for_more_than_a_name(tmp_path) -> None:
    folder = tmp_path / "my-nemotron-reward-v1"
    save_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_spec(str(folder)).recipe.family == "scalar head"


def test_the_folders_that_a_language_model_lies_in_do_not_make_it_a_reward_model(tmp_path) -> None:
    folder = save_language_model(tmp_path / "nemotron" / "reward" / "plain")
    with pytest.raises(LoadFailed, match="no scalar head"):
        read_spec(str(folder))


@pytest.mark.parametrize("save", [save_checkpoint, save_language_model])
def test_a_head_of_any_name_is_among_the_keys_that_could_be_one(tmp_path, save) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["critic.weight"] = weights.pop("score.weight", weights["model.norm.weight"][None].clone())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = refusal(tmp_path)
    assert "critic.weight" in told and "layers." not in told


def test_a_layer_of_a_head_that_is_not_known_is_named(tmp_path) -> None:
    save_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    weights |= {
        "score.0.weight": torch.zeros(64),
        "score.0.bias": torch.zeros(64),
        "score.1.weight": torch.zeros(1, 64),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match=r"score\.0\.weight \(64,\): no layer of a head that is known"):
        read_spec(str(tmp_path))


def batch_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(16)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


@pytest.mark.parametrize(
    "middle",
    [
        lambda: [nn.ReLU()],
        lambda: [nn.ReLU(), nn.Dropout()],
        lambda: [batch_norm(), nn.ReLU()],
        lambda: [batch_norm(), nn.ReLU(), nn.Dropout()],
        lambda: [nn.ReLU(), batch_norm()],
        lambda: [nn.ReLU(), batch_norm(), nn.Dropout()],
    ],
)
def test_a_head_of_numbered_layers_is_the_one_that_was_saved(folder, middle) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(HIDDEN, 16), *middle(), nn.Linear(16, 1)).eval()
    folder.reweigh(lambda w: [w.pop("score.weight"), w.update({f"score.{k}": t for k, t in head.state_dict().items()})])
    states = torch.randn(5, HIDDEN)
    assert torch.allclose(read_spec(str(folder.path)).recipe.head(states), head(states), atol=1e-5)


def test_an_activation_whose_place_is_not_told_is_refused(folder) -> None:
    head = nn.Sequential(nn.Linear(HIDDEN, 16), batch_norm(), nn.Linear(16, 1))
    folder.reweigh(lambda w: [w.pop("score.weight"), w.update({f"score.{k}": t for k, t in head.state_dict().items()})])
    assert "score.1 normalises between two products" in refusal(folder.path)
