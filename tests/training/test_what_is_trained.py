"""Which weights a recipe moves, and where their scores are read."""

import json
from dataclasses import replace

import checkpoints
import pytest
import torch
import zoo
from preferences import SMALL, material_of, pair_rows, save_reward_base
from rewardserve.errors import LoadFailed
from rewardserve.training import base, member
from rewardserve.training.recipe import Recipe
from transformers import AutoConfig, AutoModelForSequenceClassification

RECIPE = Recipe(max_steps=3, batch_size=4, learning_rate=1e-2, use_cpu=True)
LAYERS = SMALL["num_hidden_layers"]


def moved(folder, recipe, tmp_path):
    """Names of the parameters that training changed, by the model's own names."""
    before = member.prepare(folder, recipe, seed=0)
    start = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    trainer = member.make_trainer(before, material_of(folder), recipe, 0, tmp_path / "scratch")
    trainer.train()
    return {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, start[name])}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_closed_layers_stay_as_they_were_and_open_ones_all_move(reward_base, tmp_path, number):
    names = moved(reward_base, replace(RECIPE, open_layers=number), tmp_path)
    layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
    assert layers == set(range(LAYERS - number, LAYERS))
    others = {name for name in names if not name.startswith("model.layers.")}
    assert others == ({"score.weight", "model.norm.weight"} if number else {"score.weight"})


def test_without_a_number_everything_moves(reward_base, tmp_path):
    model = member.prepare(reward_base, RECIPE, seed=0)
    assert moved(reward_base, RECIPE, tmp_path) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("number", [-1, 1])
def test_adapters_move_on_open_layers_and_with_them_the_head_alone(reward_base, tmp_path, number):
    names = moved(reward_base, replace(RECIPE, lora_rank=2, open_layers=number), tmp_path)
    adapters = {name for name in names if "lora_" in name}
    assert {name for name in names - adapters} == {"base_model.model.score.modules_to_save.default.weight"}
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in adapters}
    assert layers == set(range(LAYERS if number < 0 else LAYERS - number, LAYERS)) or (
        number < 0 and len(layers) == LAYERS
    )
    matrices = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters}
    assert matrices == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_layers_are_found_whatever_a_family_calls_them(tmp_path, family):
    checkpoints.save_checkpoint(tmp_path, family, texts=["tea"])
    for recipe in (replace(RECIPE, open_layers=1), replace(RECIPE, open_layers=1, lora_rank=2)):
        model = member.prepare(tmp_path, recipe, seed=0)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("score" in name for name in names) and any(".2." in name for name in names)
        assert not any(".0." in name or ".1." in name for name in names)


def test_more_layers_than_there_are_is_refused(reward_base):
    for rank in (0, 2):
        with pytest.raises(LoadFailed, match="--open-layers 4: the base has 3 layers"):
            member.prepare(reward_base, replace(RECIPE, open_layers=4, lora_rank=rank), seed=0)


# -- the head ----------------------------------------------------------------------------------------------------------


def test_a_reward_models_head_is_kept_unless_a_new_one_is_asked_for(reward_base):
    own = AutoModelForSequenceClassification.from_pretrained(reward_base).score.weight
    kept = base.load_base(reward_base, RECIPE, seed=0).score.weight
    new = [base.load_base(reward_base, replace(RECIPE, new_head=True), seed=seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(kept, own)
    assert torch.equal(new[0], new[1]) and not torch.equal(new[0], new[2]) and not torch.equal(new[0], own)


def test_a_language_model_gets_a_head_and_keeps_its_backbone(causal_base):
    models = [base.load_base(causal_base, RECIPE, seed=seed) for seed in (0, 1)]
    same = {name: torch.equal(p, dict(models[1].named_parameters())[name]) for name, p in models[0].named_parameters()}
    assert [name for name, equal in same.items() if not equal] == ["score.weight"]


def test_a_head_of_another_kind_is_refused(reward_base):
    with pytest.raises(LoadFailed, match=r"has a head of kind 'linear': go on with --head linear, or .* --new-head"):
        base.load_base(reward_base, replace(RECIPE, head="mlp"), seed=0)


@pytest.mark.parametrize("name", ["INF-ORM-Llama3.1-70B", "Qwen2.5-Math-RM-72B"])
def test_an_mlp_that_others_have_trained_is_gone_on_with(tmp_path, name):
    folder, scored = zoo.write(zoo.ZOO[name], tmp_path)
    with pytest.raises(LoadFailed, match=r"has a head of kind 'mlp': go on with --head mlp, or .* --new-head"):
        base.load_base(folder, RECIPE, seed=0)
    ids = list(range(20, 40))
    kept, new = (base.load_base(folder, replace(RECIPE, head="mlp", new_head=new), 0).eval() for new in (False, True))
    scores = [model(input_ids=torch.tensor([ids])).logits.item() for model in (kept, new)]
    assert scores[0] == pytest.approx(scored(ids).score, abs=1e-5) != pytest.approx(scores[1], abs=1e-2)


@pytest.mark.parametrize(
    "name",
    ["ArmoRM-Llama3-8B", "GRM-sftreg", "Eurus-RM-7b", "Beaver-7b reward", "Athene-RM-8B", "Qwen2.5-Math-PRM-7B",
     "OpenRLHF value_head_prefix", "TRL and LLaMA-Factory value head"],
)  # fmt: skip
def test_a_head_that_cannot_be_trained_here_is_not_left_behind_without_a_word(tmp_path, name):
    folder, _ = zoo.write(zoo.ZOO[name], tmp_path)
    for head in ("linear", "mlp"):
        with pytest.raises(LoadFailed, match="a head that cannot be trained here; begin with a new one: --new-head"):
            base.load_base(folder, replace(RECIPE, head=head), seed=0)
    assert base.load_base(folder, replace(RECIPE, new_head=True), seed=0).score.out_features == 1


def test_a_head_that_a_file_beside_it_explains_is_not_read_otherwise(tmp_path):
    folder, _ = zoo.write(zoo.ZOO["Skywork-Reward-V2 Qwen3"], tmp_path)
    (folder / "rewardserve.toml").write_text('[head]\nkind = "linear"\nweights = "score"\n[read]\nat = "mean"\n')
    with pytest.raises(LoadFailed, match="a head that cannot be trained here"):
        base.load_base(folder, RECIPE, seed=0)


@pytest.mark.parametrize("name", ["Llama-3.1-Nemotron-70B-Reward-HF", "math-shepherd-mistral-7b-prm"])
def test_a_language_model_whose_logits_are_its_scores_gets_a_head(tmp_path, name):
    folder, _ = zoo.write(zoo.ZOO[name], tmp_path)
    assert base.load_base(folder, RECIPE, seed=0).score.out_features == 1


def test_a_head_of_several_labels_is_refused_unless_a_new_one_is_asked_for(tmp_path):
    model = checkpoints.make_model("qwen3", **SMALL)
    model.score = torch.nn.Linear(SMALL["hidden_size"], 5, bias=False)
    model.config.num_labels = 5
    model.save_pretrained(tmp_path)
    with pytest.raises(LoadFailed, match="more than one label"):
        base.load_base(tmp_path, RECIPE, seed=0)
    assert base.load_base(tmp_path, replace(RECIPE, new_head=True), seed=0).score.out_features == 1


def test_a_base_with_a_weight_missing_is_refused(tmp_path, reward_base):
    from safetensors.torch import load_file, save_file

    save_reward_base(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadFailed, match=r"missing.*layers\.1\.mlp\.up_proj"):
        base.load_base(tmp_path, RECIPE, seed=0)


@pytest.mark.parametrize("what", ["nothing", "no config", "an encoder-decoder", "an encoder"])
def test_what_is_no_base_is_said(tmp_path, what):
    if what == "nothing":
        (tmp_path / "config.json").write_text("{}")
    if what.startswith("an "):
        config = checkpoints.AutoConfig.for_model("t5" if "decoder" in what else "bert")
        config.save_pretrained(tmp_path)
    with pytest.raises(LoadFailed, match=str(tmp_path)):
        base.load_base(tmp_path, RECIPE, seed=0)


# -- where the score is read -------------------------------------------------------------------------------------------


def test_a_gemma_is_trained_with_the_activation_that_it_had(tmp_path):
    """The first ones' files call it gelu. It is its approximation, as in serving."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma", num_key_value_heads=1, head_dim=8, vocab_size=50, num_labels=1, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    x = torch.linspace(-3, 3, 50)
    (layer,) = base.load_base(tmp_path, RECIPE, 0).model.layers
    assert torch.allclose(layer.mlp.act_fn(x), torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)


def test_a_soft_cap_is_trained_with(tmp_path):
    checkpoints.save_checkpoint(tmp_path, "gemma2", attn_logit_softcapping=0.5)
    row = list(range(5, 60))
    model = base.load_base(tmp_path, RECIPE, 0).eval()
    wanted = checkpoints.padded_scores(tmp_path, [row], torch.float32)
    assert last_token_scores(model, [torch.tensor(row)]).item() == pytest.approx(wanted.item(), rel=1e-4)


def last_token_scores(model, rows):
    """The head's score at each row's last token, without padding."""
    with torch.inference_mode():
        hidden = [model.model(input_ids=torch.tensor([row.tolist()])).last_hidden_state[0, -1] for row in rows]
        return torch.stack([model.score(state)[0] for state in hidden])


@pytest.mark.parametrize("closing", ["<|im_end|>", "<|im_end|>\n"])
def test_padding_changes_no_score_even_where_it_is_the_closing_token(tmp_path, closing):
    """As many checkpoints have it: <|im_end|> closes a turn, and pads."""
    save_reward_base(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        checkpoints.TEMPLATE.replace("<|im_end|>\\n", closing.replace("\n", "\\n"))
    )
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|pad|>", "<|im_end|>"))
    material = material_of(tmp_path)
    trainer = member.make_trainer(member.prepare(tmp_path, RECIPE, 0), material, RECIPE, 0, tmp_path / "scratch")
    assert trainer.processing_class.pad_token == "<|im_end|>"
    trainer.evaluate()
    wanted = last_token_scores(trainer.model.eval(), material.held_out.ids)
    torch.testing.assert_close(torch.from_numpy(trainer.held_out_scores).float(), wanted, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_what_is_in_the_batch(reward_base, tmp_path):
    material = material_of(reward_base, pair_rows(7))
    scores = []
    for size in (1, 4):
        recipe = replace(RECIPE, batch_size=size)
        trainer = member.make_trainer(member.prepare(reward_base, recipe, 0), material, recipe, 0, tmp_path / "scratch")
        trainer.evaluate()
        scores.append(torch.from_numpy(trainer.held_out_scores))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
