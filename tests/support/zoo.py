"""Random tiny checkpoints of every family of reward models: the published names, config and class strings, and for each
an independent statement of its published formula in plain torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

HIDDEN = 32
Tensors = dict[str, torch.Tensor]
ASSISTANT = [128009, 128006, 78191, 128007, 271]
EXTRA_0, KI, CLS, REWARD = 151651, 12902, 128003, 92527


@dataclass(frozen=True)
class Wanted:
    score: float
    attributes: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    std: float | None = None


# hidden states [tokens, HIDDEN] fp32 of prompt + response, their ids, the checkpoint's tensors by their published names
Formula = Callable[[torch.Tensor, list[int], Tensors], Wanted]


@dataclass(frozen=True)
class Kind:
    """One row of the zoo."""

    backbone: str  # model type
    architecture: str
    head: Callable[[], Tensors]
    formula: Formula
    vocab_size: int = 400
    config: dict[str, Any] = field(default_factory=dict)  # besides, as published
    rename: Callable[[Tensors], Tensors] = lambda tensors: {f"model.{k}": t for k, t in tensors.items()}
    folder: str = "checkpoint"
    sprinkled: tuple[list[int], ...] = ()  # what the model looks for; the tests put it into prompts and responses
    ends: list[int] = field(default_factory=list)  # what every response ends in
    as_bin: bool = False
    after: Callable[[Path, Tensors], None] = lambda folder, tensors: None
    packed: bool = True


def normal(*shape: int, std: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape) * std


def mlp(tensors: Tensors, prefix: str, x: torch.Tensor, activation=F.relu) -> torch.Tensor:
    numbers = sorted({int(k.removeprefix(prefix + ".").split(".")[0]) for k in tensors if k.startswith(prefix + ".")})
    for i in numbers:
        if i != numbers[0]:
            x = activation(x)
        x = F.linear(x, tensors[f"{prefix}.{i}.weight"], tensors.get(f"{prefix}.{i}.bias"))
    return x


def linear_head(name: str, bias: bool = False) -> Callable[[], Tensors]:
    return lambda: {f"{name}.weight": normal(1, HIDDEN)} | ({f"{name}.bias": normal(1)} if bias else {})


def mlp_head(name: str, *widths: int, step: int = 2, bias: bool = True) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors, size = {}, HIDDEN
        for i, width in enumerate(widths):
            tensors[f"{name}.{i * step}.weight"] = normal(width, size)
            if bias:
                tensors[f"{name}.{i * step}.bias"] = normal(width)
            size = width
        return tensors

    return make


def at_last(name: str) -> Formula:
    return lambda h, ids, t: Wanted(F.linear(h[-1], t[f"{name}.weight"], t.get(f"{name}.bias")).item())


def mlp_at_last(name: str) -> Formula:
    return lambda h, ids, t: Wanted(mlp(t, name, h[-1]).item())


def last_start(ids: list[int], pattern: Sequence[int]) -> int:
    return max(i for i in range(len(ids)) if ids[i : i + len(pattern)] == list(pattern))


def armorm_head() -> Tensors:
    sizes = [HIDDEN, 24, 24, 24, 19]
    gating = {f"gating.layers.{i}.weight": normal(sizes[i + 1], sizes[i]) for i in range(4)}
    gating |= {f"gating.layers.{i}.bias": normal(sizes[i + 1]) for i in range(4)}
    return gating | {
        "gating.logit_scale": torch.tensor([1.7]),
        "regression_layer.weight": normal(19, HIDDEN),
        "reward_transform_matrix": normal(19, 19),
    }


def armorm(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    x = h[last_start(ids, ASSISTANT)]
    for i in range(4):
        x = F.linear(x, t[f"gating.layers.{i}.weight"], t[f"gating.layers.{i}.bias"])
        x = F.relu(x) if i < 3 else x
    gate = F.softmax(x / 10, dim=-1) * t["gating.logit_scale"][0]
    rewards = F.linear(h[-1], t["regression_layer.weight"])
    return Wanted((gate * (rewards @ t["reward_transform_matrix"])).sum().item(), tuple(rewards.tolist()))


def qrm_head() -> Tensors:
    sizes = [HIDDEN, 24, 24, 24]
    tensors: Tensors = {"regression_layer.weight": normal(19 * 19, HIDDEN), "gating.logit_scale": torch.tensor([1.3])}
    for i in range(3):
        width = sizes[i + 1]
        tensors[f"gating.layers.{3 * i}.weight"] = normal(width, sizes[i])
        norm = f"gating.layers.{3 * i + 2}"
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = normal(width), normal(width)
        tensors[f"{norm}.running_mean"], tensors[f"{norm}.running_var"] = normal(width), torch.rand(width) + 0.5
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    tensors["gating.layers.9.weight"], tensors["gating.layers.9.bias"] = normal(19, 24), normal(19)
    return tensors | {"reward_transform_matrix": normal(19, 19)}


def qrm(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    x = h[last_start(ids, ASSISTANT)]
    for i in range(3):
        x = F.relu(F.linear(x, t[f"gating.layers.{3 * i}.weight"]))
        n = f"gating.layers.{3 * i + 2}"
        x = (x - t[f"{n}.running_mean"]) / (t[f"{n}.running_var"] + 1e-5).sqrt() * t[f"{n}.weight"] + t[f"{n}.bias"]
    x = F.linear(x, t["gating.layers.9.weight"], t["gating.layers.9.bias"])
    gate = F.softmax(x / 10, dim=-1) * t["gating.logit_scale"][0]
    quantiles = F.linear(h[-1], t["regression_layer.weight"]).reshape(19, 19)  # [objectives, quantiles]
    mixed = (gate[:, None] * (quantiles.T @ t["reward_transform_matrix"]).T).sum(0)  # [quantiles]
    score = (gate * (quantiles.mean(1) @ t["reward_transform_matrix"])).sum()
    return Wanted(score.item(), tuple(quantiles.mean(1).tolist()), std=mixed.std(correction=0).item())


def urm_head() -> Tensors:
    weights = mlp_head("weights.fc", HIDDEN, HIDDEN, 5)()
    return {"score.weight": normal(10, HIDDEN)} | weights


def urm(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    means = F.linear(h[-1], t["score.weight"]).view(5, 2)[:, 0]
    weights = mlp(t, "weights.fc", h[-1], F.selu)
    return Wanted((means * weights).sum().item(), tuple(means.tolist()))


def qwen_prm(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    logits = mlp(t, "score", h[[i for i, token in enumerate(ids) if token == EXTRA_0]])
    steps = F.softmax(logits, dim=-1)[:, 1].tolist()
    return Wanted(min(steps), steps=tuple(steps))


def math_shepherd(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    logits = F.linear(h, t["lm_head.weight"])[:, [648, 387]]
    odds = logits.softmax(dim=-1)[:, 0]
    steps = odds[torch.tensor(ids) == KI].tolist()
    return Wanted(min(steps), steps=tuple(steps))


def rlhflow(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    """A pass for each step in the published script, read at -3 of [.., header's end, '+', <|eot_id|>]."""
    header = ASSISTANT[1:]
    slots = [i + 3 for i in range(len(ids)) if ids[i : i + 4] == header]
    steps = [F.linear(h[slot], t["lm_head.weight"])[[10, 12]].softmax(-1)[0].item() for slot in slots]
    return Wanted(min(steps), steps=tuple(steps))


def nemotron(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    return Wanted(F.linear(h[-1], t["lm_head.weight"])[0].item())


def beaver(normalize: Callable[[float, float, float], float]) -> Formula:
    def formula(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
        raw = F.linear(h[-1], t["score_head.weight"], t["score_head.bias"]).item()
        return Wanted(normalize(raw, t["normalizer.mean"].item(), t["normalizer.var"].item()))

    return formula


def beaver_head() -> Tensors:
    buffers = {"normalizer.mean": torch.tensor([0.7]), "normalizer.var": torch.tensor([2.5])}
    return linear_head("score_head", bias=True)() | buffers | {"normalizer.count": torch.tensor([9])}


def deberta(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    pooled = F.gelu(F.linear(h[0], t["pooler.dense.weight"], t["pooler.dense.bias"]))
    return Wanted(F.linear(pooled, t["classifier.weight"], t["classifier.bias"]).item())


def deberta_head() -> Tensors:
    dense = {"pooler.dense.weight": normal(HIDDEN, HIDDEN), "pooler.dense.bias": normal(HIDDEN)}
    return dense | linear_head("classifier", bias=True)()


def oasst_mean(h: torch.Tensor, ids: list[int], t: Tensors) -> Wanted:
    return Wanted(F.linear(h.mean(0), t["out_proj.weight"], t["out_proj.bias"]).item())


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def internlm2_names(tensors: Tensors) -> Tensors:
    """wqkv: for each key head its query heads, its key and its value."""
    renamed: Tensors = {}
    heads, kv_heads, size = 4, 2, HIDDEN // 4
    for key, tensor in tensors.items():
        if "_proj" in key and "self_attn.o" not in key and "self_attn" in key:
            continue
        for ours, theirs in (
            ("embed_tokens", "tok_embeddings"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            key = key.replace(ours, theirs)
        renamed[f"model.{key}"] = tensor
    for layer in range(3):
        q, k, v = (tensors[f"layers.{layer}.self_attn.{p}_proj.weight"] for p in "qkv")
        rows = []
        for head in range(kv_heads):
            per = heads // kv_heads * size
            rows += [q[head * per : (head + 1) * per], k[head * size : (head + 1) * size]]
            rows.append(v[head * size : (head + 1) * size])
        renamed[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    return renamed


def value_head_file(folder: Path, tensors: Tensors) -> None:
    save_file(
        {"v_head.summary.weight": normal(1, HIDDEN), "v_head.summary.bias": normal(1)},
        folder / "value_head.safetensors",
    )


LLAMA3 = 128256
SCORE = {"head": linear_head("score"), "formula": at_last("score")}


def no_head() -> Tensors:
    return {}


ZOO: dict[str, Kind] = {
    "Skywork-Reward-V2 Qwen3": Kind("qwen3", "Qwen3ForSequenceClassification", **SCORE),
    "Skywork-Reward-V2 Llama": Kind("llama", "LlamaForSequenceClassification", **SCORE),
    "Skywork-Reward Gemma-2": Kind("gemma2", "Gemma2ForSequenceClassification", **SCORE),
    "ArmoRM-Llama3-8B": Kind(
        "llama",
        "LlamaForRewardModelWithGating",
        armorm_head,
        armorm,
        LLAMA3,
        sprinkled=(ASSISTANT,),
        config={"gating_temperature": 10, "gating_hidden_dim": 24, "gating_n_hidden": 3},
    ),
    "QRM-Llama3.1-8B": Kind(
        "llama",
        "LlamaForRewardModelWithGating31",
        qrm_head,
        qrm,
        LLAMA3,
        sprinkled=(ASSISTANT,),
    ),
    "URM-LLaMa-3.1-8B": Kind("llama", "LlamaForSequenceClassificationWithNormal_Weights", urm_head, urm),
    "GRM-sftreg": Kind(
        "llama",
        "GRewardModel",
        mlp_head("v_head.summary", 24, 1),
        mlp_at_last("v_head.summary"),
        config={"vhead_layer_type": "mlp", "vhead_num_layers": 1},
    ),
    "GRM-sftreg, linear": Kind(
        "llama",
        "GRewardModel",
        linear_head("v_head.summary", bias=True),
        at_last("v_head.summary"),
        config={"vhead_layer_type": "linear"},
    ),
    "GRM-rewardmodel-ft": Kind("mistral", "MistralForSequenceClassification", **SCORE),
    "INF-ORM-Llama3.1-70B": Kind(
        "llama", "INFORMForSequenceClassification", mlp_head("score", HIDDEN, 1), mlp_at_last("score")
    ),
    "Qwen2.5-Math-RM-72B": Kind("qwen2", "Qwen2ForRewardModel", mlp_head("score", HIDDEN, 1), mlp_at_last("score")),
    "Qwen2.5-Math-PRM-7B": Kind(
        "qwen2",
        "Qwen2ForProcessRewardModel",
        mlp_head("score", HIDDEN, 2),
        qwen_prm,
        152064,
        sprinkled=([EXTRA_0],),
        ends=[EXTRA_0],
    ),
    "WorldPM-72B": Kind("qwen2", "Qwen2ForRewardModel", **SCORE),
    "internlm2-7b-reward": Kind(
        "llama",
        "InternLM2ForRewardModel",
        linear_head("v_head"),
        at_last("v_head"),
        92544,
        config={"model_type": "internlm2", "reward_token_id": REWARD, "auto_map": {"AutoModel": "x.InternLM2"}},
        rename=internlm2_names,
        ends=[REWARD],
    ),
    "Llama-3.1-Nemotron-70B-Reward-HF": Kind(
        "llama", "LlamaForCausalLM", no_head, nemotron, folder="Llama-3.1-Nemotron-70B-Reward-HF"
    ),
    "Qwen-3-Nemotron-32B-Reward": Kind("qwen3", "Qwen3ForSequenceClassification", **SCORE),
    "Athene-RM-8B": Kind(
        "llama",
        "CustomAutoModelForSequenceClassification",
        linear_head("v_head"),
        at_last("v_head"),
        LLAMA3,
        ends=[CLS],
    ),
    "Starling-RM-7B-alpha": Kind(
        "llama",
        "LlamaForCausalLM",
        linear_head("v_head"),
        at_last("v_head"),
        rename=prefixed("transformer."),
        as_bin=True,
    ),
    "Starling-RM-34B": Kind(
        "llama",
        "LlamaForSequenceClassification",
        linear_head("v_head"),
        at_last("v_head"),
        rename=prefixed("transformer."),
    ),
    "UltraRM-13b": Kind(
        "llama", "LlamaRewardModel", linear_head("regression_head"), at_last("regression_head"), as_bin=True
    ),
    "Eurus-RM-7b": Kind("mistral", "EurusRewardModel", linear_head("regression_head"), at_last("regression_head")),
    "Beaver-7b reward": Kind(
        "llama",
        "LlamaForScore",
        beaver_head,
        beaver(lambda raw, mean, var: (raw - mean) / (var**0.5 + 1e-8)),
        config={"do_normalize": True, "score_type": "reward", "normalizer_type": "RunningMeanStd"},
    ),
    "Beaver-7b cost": Kind(
        "llama",
        "LlamaForScore",
        beaver_head,
        beaver(lambda raw, mean, var: raw / (var**0.5 + 1e-8)),
        config={"do_normalize": True, "score_type": "cost", "normalizer_type": "RunningMeanStd"},
    ),
    "Beaver-7b, not normalised": Kind(
        "llama", "LlamaForScore", beaver_head, beaver(lambda raw, mean, var: raw), config={"do_normalize": False}
    ),
    "OASST deberta-v3-large-v2": Kind(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        deberta_head,
        deberta,
        rename=prefixed("deberta."),
        packed=False,
    ),
    "OASST rm-pythia, mean": Kind(
        "gpt_neox",
        "GPTNeoXRewardModel",
        linear_head("out_proj", bias=True),
        oasst_mean,
        config={"model_type": "gpt_neox_reward_model", "pooling": "mean"},
        rename=prefixed("gpt_neox."),
    ),
    "OASST rm-pythia, last": Kind(
        "gpt_neox",
        "GPTNeoXRewardModel",
        linear_head("out_proj", bias=True),
        at_last("out_proj"),
        config={"model_type": "gpt_neox_reward_model", "pooling": "last"},
        rename=prefixed("gpt_neox."),
    ),
    "FsfairX, OffsetBias, Tulu-3": Kind("llama", "LlamaForSequenceClassification", **SCORE),
    "RM-Gemma-2B": Kind("gemma", "GemmaForSequenceClassification", **SCORE),
    "AceMath-7B-RM": Kind("qwen2", "Qwen2ForSequenceClassification", **SCORE),
    "math-shepherd-mistral-7b-prm": Kind(
        "mistral",
        "MistralForCausalLM",
        no_head,
        math_shepherd,
        32000,
        folder="math-shepherd-mistral-7b-prm",
        sprinkled=([KI],),
        ends=[KI],
    ),
    "RLHFlow Llama3.1-8B-PRM-Mistral-Data": Kind(
        "llama",
        "LlamaForCausalLM",
        no_head,
        rlhflow,
        LLAMA3,
        folder="Llama3.1-8B-PRM-Mistral-Data",
        sprinkled=(ASSISTANT,),
        ends=[*ASSISTANT, 10, 128009],
    ),
    "TRL and LLaMA-Factory value head": Kind(
        "llama", "LlamaForCausalLM", no_head, at_last("v_head.summary"), after=value_head_file
    ),
    "OpenRLHF value_head_prefix": Kind(
        "qwen2",
        "Qwen2ForCausalLM",
        linear_head("my_value"),
        at_last("my_value"),
        config={"value_head_prefix": "my_value"},
    ),
    "OpenRLHF mean and std": Kind(
        "qwen2",
        "Qwen2ForCausalLM",
        linear_head("value_head"),
        lambda h, ids, t: Wanted((F.linear(h[-1], t["value_head.weight"]).item() - 0.4) / 1.6),
        config={"value_head_prefix": "value_head", "mean": 0.4, "std": 1.6},
    ),
    "DeepSpeed-Chat": Kind(
        "llama",
        "LlamaForCausalLM",
        linear_head("v_head"),
        at_last("v_head"),
        rename=prefixed("rwtranrsformer."),
        as_bin=True,
    ),
    "a backbone below pretrained_model.": Kind(
        "qwen2",
        "Qwen2ForCausalLM",
        linear_head("v_head.summary", bias=True),
        at_last("v_head.summary"),
        rename=prefixed("pretrained_model.model."),
    ),
}

STEPWISE = Kind(  # its steps are named by the request
    "qwen2",
    "Qwen2ForPrmModel",
    linear_head("v_head.summary", bias=True),
    lambda h, ids, t: Wanted(
        0.0,
        steps=tuple(torch.sigmoid(F.linear(h, t["v_head.summary.weight"], t["v_head.summary.bias"]))[:, 0].tolist()),
    ),
)


def write(kind: Kind, tmp: Path) -> tuple[Path, "Oracle"]:
    """The checkpoint's folder, and what its scores are."""
    folder = tmp / kind.folder
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind.backbone, **_config(kind))
    module = AutoModel.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    head = kind.head()
    if kind.architecture.endswith("ForCausalLM"):
        head = {"lm_head.weight": normal(kind.vocab_size, HIDDEN)} | head
    tensors = kind.rename(dict(module.state_dict())) | head
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    raw = config.to_dict() | {"architectures": [kind.architecture]} | kind.config
    (folder / "config.json").write_text(json.dumps(raw, default=str))
    if kind.as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    kind.after(folder, tensors)
    for extra in folder.glob("value_head.safetensors"):
        from safetensors.torch import load_file

        tensors |= load_file(extra)
    return folder, Oracle(module, kind, tensors)


def _config(kind: Kind) -> dict[str, Any]:
    common = {
        "vocab_size": kind.vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
    }
    if kind.backbone in ("gpt_neox", "deberta-v2"):
        return common
    return common | {"num_key_value_heads": 2, "head_dim": HIDDEN // 4}


@dataclass(frozen=True)
class Oracle:
    module: torch.nn.Module
    kind: Kind
    tensors: Tensors

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> Wanted:
        """Of prompt + response, alone, by plain Hugging Face and the formula."""
        hidden = self.module(input_ids=torch.tensor([ids])).last_hidden_state[0].float()
        return self.kind.formula(hidden, ids, self.tensors)
