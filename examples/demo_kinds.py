"""`make demo-kinds`: one server with a model of each kind, all but the encoder made of the bundled one, and what each
answers.

The heads of these kinds are not trained: what they say means nothing, how they are served is the point. A judge that
writes is left out: it needs vLLM, and a model that can write.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import demo
import torch
from rewardserve.client import Group, ItemScore, RewardClient, Steps
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION = "How do I keep bread fresh?"
ANSWER = ("Let it cool first.", "Keep it in a paper bag or a bread box.", "Freeze what you will not eat soon.")
TAG = "<|pad|>"  # a token that no text holds
LINEAR = '[head]\nkind = "linear"\nweights = "score"\n'
JUDGE = """[judge]
template = "Question: {prompt}\\nAnswer: {response}\\nIs this a good answer? Yes or No."
labels = ["Yes", "No"]
values = [1.0, 0.0]
"""


def make(folder: Path) -> dict[str, Path]:
    """Name -> checkpoint of a kind."""
    from transformers import AutoTokenizer

    plain = demo.HERE / "demo_model"
    tokenizer = AutoTokenizer.from_pretrained(plain)
    weights = load_file(plain / "model.safetensors")
    hidden = weights["score.weight"].shape[1]
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) / shape[-1] ** 0.5

    tag = tokenizer.convert_tokens_to_ids(TAG)
    header = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    gate = {"gating.layers.0.weight": normal(64, hidden), "gating.layers.1.weight": normal(4, 64)}
    kinds: dict[str, tuple[dict[str, torch.Tensor], dict[str, object], str]] = {
        "steps": (
            {},
            {},
            f'{LINEAR}activation = "sigmoid"\n[read]\nat = "every"\npattern = [{tag}]\n'
            f'[steps]\nstyle = "tagged"\ntag = "{TAG}"\n',
        ),
        "mean": ({}, {}, f'{LINEAR}[read]\nat = "mean"\n'),
        "mlp": ({"score.0.weight": normal(64, hidden), "score.2.weight": normal(1, 64)}, {}, ""),
        "gated": (
            {**gate, "gating.logit_scale": torch.ones(1), "regression_layer.weight": normal(4, hidden)},
            {"architectures": ["LlamaForRewardModelWithGating"], "gating_pattern": header},
            "",
        ),
        "judge": ({}, {"architectures": ["Qwen3ForCausalLM"]}, JUDGE),
    }
    made = {}
    for name, (head, config, told) in kinds.items():
        target = made[name] = folder / name
        shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
        body = {key: tensor for key, tensor in weights.items() if not head or not key.startswith("score")}
        save_file({**body, **{key: tensor.bfloat16() for key, tensor in head.items()}}, target / "model.safetensors")
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if told:
            (target / "rewardserve.toml").write_text(told)
    made["encoder"] = _encoder(folder / "encoder", tokenizer)
    return made


def _encoder(target: Path, tokenizer: "PreTrainedTokenizerFast") -> Path:
    """Reads a prompt and a response as one pair, from both sides at once."""
    from tokenizers.processors import TemplateProcessing
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{TAG} $A {end}",
        pair=f"{TAG} $A {end} $B {end}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (TAG, end)],
    )
    tokenizer.chat_template, tokenizer.cls_token, tokenizer.sep_token = None, TAG, end
    tokenizer.save_pretrained(target)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        type_vocab_size=0,
        num_labels=1,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(target)
    return target


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        made = make(Path(scratch))
        members = {f"seed-{n}": demo.HERE / "demo_ensemble" / f"seed-{n}" for n in range(3)}
        models = {"scalar": demo.HERE / "demo_model", **members, **made}
        flags = [f"--model={name}={folder}" for name, folder in models.items()]
        with demo.served(
            *flags, "--ensemble", "ensemble=mean(seed-0+seed-1+seed-2)", "--prefix-cache-mb", "16"
        ) as endpoint:
            _show(endpoint, [*models, "ensemble"])
    return 0


def _show(endpoint: str, names: list[str]) -> None:
    table = Table("name", "kind", "score", "means", "besides")
    with RewardClient(endpoint) as client:
        served = {model.name: model for model in client.list_models()}
        for name in names:
            response = Steps(ANSWER) if served[name].scores_steps else " ".join(ANSWER)
            item = client.score([Group(QUESTION, [response])], model=name).groups[0].items[0]
            kind = served[name].aggregate or served[name].architecture
            table.add_row(name, kind, f"{item.score:.3f}", item.kind.replace("_", " "), _besides(item))
    Console(width=120).print(table)


def _besides(item: ItemScore) -> str:
    told = []
    if item.steps:
        told.append("steps " + ", ".join(f"{score:.2f}" for score in item.steps))
    told += [f"{name} {value:.2f}" for name, value in {**item.attributes, **item.members}.items()]
    if item.std is not None:
        told.append(f"std {item.std:.2f}")
    return "; ".join(told)


if __name__ == "__main__":
    raise SystemExit(main())
