"""How the reward models that people use are built: from a checkpoint's names to its head and where the head reads.

The first family that recognizes a checkpoint builds it. What is not recognized is an error that lists the keys found:
a head that is guessed wrong gives scores all the same. Facts are from the models' published code and configs; what is
only assumed says so in `assumes`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rewardserve.errors import LoadFailed
from rewardserve.models import heads
from rewardserve.models.checkpoint import Checkpoint
from rewardserve.models.head_parts import (
    HEAD_NAMES,
    head_prefix,
    keys_below,
    layers_below,
    lm_head,
    odds_head,
    scalar_head,
)
from rewardserve.models.heads import Head, ModuleHead
from rewardserve.models.reads import Pattern, ReadAt, ReadPlan
from rewardserve.types import JudgeFormat, StepFormat, StepStyle

# model types that transformers does not know, and what they are but for the names of their parts
FOREIGN_CONFIGS = {"internlm2": "llama", "gpt_neox_reward_model": "gpt_neox"}

HEAD_LIKE = (*HEAD_NAMES, "regression_layer", "gating", "lm_head")
OF_BACKBONE = re.compile(r"\b(layers?|h|blocks?)\.\d+\.|embed|norm|\b(wte|wpe|ln_f)\.")  # in the names of most
# ids of the published Llama 3 vocabulary: <|eot_id|>, <|start_header_id|>, "assistant", <|end_header_id|>, "\n\n"
LLAMA3_ASSISTANT = (128009, 128006, 78191, 128007, 271)
GEMMA2_ASSISTANT = (
    107,
    108,
    106,
    2516,
    108,
)  # "<end_of_turn>\n<start_of_turn>model\n"
LLAMA3_CLS = 128003
ARMORM_OBJECTIVES = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)
URM_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# What begins a template of models that were shown a question and its answer, and never more turns
ONE_QUESTION = (
    "{% if messages[0].role != 'user' or messages | length != (1 if add_generation_prompt else 2) %}"
    "{{ raise_exception('it takes one question, and nothing before it') }}{% endif %}"
)
# `tokenizer.encode(f"{question} {answer}")` of a tokenizer that begins with a BOS
QUESTION_AND_ANSWER = (
    f"{ONE_QUESTION}{{{{ bos_token }}}}{{{{ messages | map(attribute='content') | join(' ') }}}}"
    "{% if add_generation_prompt %} {% endif %}"
)


AT_LAST = ReadPlan()


@dataclass(frozen=True, slots=True)
class Normalizer:
    """final = (raw - shift) / scale."""

    shift: float
    scale: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a score is made of a checkpoint's hidden states."""

    family: str
    head: Head | None  # None: of a judge that writes
    head_keys: frozenset[str]  # weights that are the head's, or nobody's
    reads: ReadPlan = AT_LAST
    appended: int | None = None  # token id that every sequence ends in; it is what is read
    attributes: tuple[str, ...] = ()
    is_probability: bool = False
    normalizer: Normalizer | None = None
    steps: StepFormat | None = None
    template: str | None = None  # of prompt and response, of models that were not trained with a chat template
    judge: JudgeFormat | None = None
    convert: Callable[[Checkpoint], dict[str, torch.Tensor]] | None = None  # weights by transformers' own names


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    models: str  # published ones
    how: str  # the formula, in a line
    recognizes: Callable[[Checkpoint], bool]
    build: Callable[[Checkpoint], Recipe]
    assumes: str = ""


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """Raises LoadFailed for a checkpoint without a head that is known."""
    for family in FAMILIES:
        if family.recognizes(checkpoint):
            return family.build(checkpoint)
    if _is_encoder(checkpoint) and any(key.startswith(("classifier.", "score.")) for key in checkpoint.where):
        raise LoadFailed(
            f"{checkpoint.folder}: what a {checkpoint.architecture} computes before its classifier is not known here. "
            "If nothing stands between its last layer and a head of one layer, or of numbered ones, say so in "
            "rewardserve.toml beside config.json (docs/models.md)"
        )
    keys = checkpoint.where
    known = [key for key in keys if any(part in key for part in HEAD_LIKE)]
    other = [key for key in keys if key not in known and not OF_BACKBONE.search(key)]
    found = [*sorted(known), *sorted(other)] or sorted(keys)[-5:]
    raise LoadFailed(
        f"{checkpoint.folder}: no scalar head ('score.weight' or another name that is known) is among the weights, so "
        f"scores would be random. Keys that could be a head: {', '.join(found[:10])}. "
        "Say what they are in rewardserve.toml beside config.json (docs/models.md)"
    )


def _config_normalizer(checkpoint: Checkpoint) -> Normalizer | None:
    """`mean` and `std` as OpenRLHF writes them into a config, and applies them to a served reward.

    An adapter's own head gives other scores than those they were measured on.
    """
    if any(key.startswith(f"{head_prefix(checkpoint)}.") for key in checkpoint.changes.whole):
        return None
    mean, std = (checkpoint.raw_config.get(name) for name in ("mean", "std"))
    if isinstance(mean, list):
        mean = mean[0] if len(mean) == 1 else None
    if isinstance(std, list):
        std = std[0] if len(std) == 1 else None
    if isinstance(mean, int | float) and isinstance(std, int | float) and std > 0 and (mean, std) != (0, 1):
        return Normalizer(float(mean), float(std))
    return None


def _is(*architectures: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: checkpoint.architecture in architectures


def _named(*parts: str, but: str = "") -> Callable[[Checkpoint], bool]:
    """A language model that only its name, with all of `parts` and without `but`, tells to be a reward model."""

    def recognizes(checkpoint: Checkpoint) -> bool:
        told = (
            checkpoint.source,
            str(checkpoint.raw_config.get("_name_or_path", "")),
            _name_in_cache(checkpoint.folder),
        )
        names = [name.rstrip("/").rpartition("/")[2].lower() for name in told]  # not of the folders it lies in
        is_plain = checkpoint.architecture.endswith("ForCausalLM") and head_prefix(checkpoint) is None
        fits = any(all(part in name for part in parts) for name in names)
        return is_plain and fits and not (but and any(but in name for name in names))

    return recognizes


def _name_in_cache(folder: Path) -> str:
    """The hub's name of a folder in its cache (models--organisation--name/snapshots/revision), or nothing."""
    *_, model, snapshots, _ = ("", "", *folder.absolute().parts)
    return model.rpartition("--")[2] if snapshots == "snapshots" and model.startswith("models--") else ""


def _prefix(checkpoint: Checkpoint) -> str:
    prefix = head_prefix(checkpoint)
    if prefix is None:
        names = ", ".join(HEAD_NAMES)
        raise LoadFailed(f"{checkpoint.folder}: a {checkpoint.architecture} without a head; looked for {names}")
    return prefix


def _scalar(checkpoint: Checkpoint) -> Recipe:
    prefix = _prefix(checkpoint)
    return Recipe(
        "scalar head",
        scalar_head(checkpoint, prefix),
        keys_below(checkpoint, prefix, "lm_head"),  # a language model's own head is often left in
        normalizer=_config_normalizer(checkpoint),
    )


def _gated(checkpoint: Checkpoint, family: str, num_quantiles: int, objectives: tuple[str, ...]) -> Recipe:
    regression = checkpoint.tensor("regression_layer.weight")
    bias = checkpoint.tensor("regression_layer.bias") if checkpoint.has("regression_layer.bias") else None
    num_objectives = len(regression) // num_quantiles
    transform = torch.eye(num_objectives)
    if checkpoint.has("reward_transform_matrix"):
        transform = checkpoint.tensor("reward_transform_matrix").float()
    scale = checkpoint.tensor("gating.logit_scale").float().flatten() if checkpoint.has("gating.logit_scale") else None
    head = heads.GatedHead(
        heads.linear(regression, bias),
        layers_below(checkpoint, "gating.layers"),
        torch.ones(1) if scale is None else scale,
        float(checkpoint.raw_config.get("gating_temperature", 10)),
        transform,
    )
    names = objectives if len(objectives) == num_objectives else tuple(f"objective-{i}" for i in range(num_objectives))
    return Recipe(
        family,
        ModuleHead(head, len(regression) + num_objectives),
        keys_below(checkpoint, "regression_layer", "gating", "lm_head", "score") | {"reward_transform_matrix"},
        ReadPlan(
            ReadAt.GATED, Pattern(_gating_pattern(checkpoint)), num_objectives, num_quantiles, "assistant's header"
        ),
        attributes=names,
    )


def _gating_pattern(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Where the last user's turn ends and the assistant's begins; of another vocabulary the config has to say it."""
    told = checkpoint.raw_config.get("gating_pattern")
    if told is None:
        return GEMMA2_ASSISTANT if checkpoint.config.model_type == "gemma2" else LLAMA3_ASSISTANT
    if not isinstance(told, list) or not told or not all(isinstance(i, int) and i >= 0 for i in told):
        raise LoadFailed(f"{checkpoint.folder}/config.json: gating_pattern is {told!r}, not a list of token ids")
    return tuple(told)


def _armorm(checkpoint: Checkpoint) -> Recipe:
    return _gated(checkpoint, "ArmoRM", 1, ARMORM_OBJECTIVES)


def _qrm(checkpoint: Checkpoint) -> Recipe:
    outputs = checkpoint.shape("regression_layer.weight")[0]
    num_quantiles = int(checkpoint.raw_config.get("num_quantiles", 19))
    if outputs % num_quantiles:
        raise LoadFailed(
            f"{checkpoint.folder}: regression_layer has {outputs} outputs, not a multiple of {num_quantiles} "
            "quantiles; say num_quantiles in config.json"
        )
    return _gated(checkpoint, "QRM", num_quantiles, ARMORM_OBJECTIVES)


def _is_gated(checkpoint: Checkpoint) -> bool:
    return checkpoint.has("regression_layer.weight") and checkpoint.architecture.startswith(
        "LlamaForRewardModelWithGating"
    )


def _has_quantiles(checkpoint: Checkpoint) -> bool:
    return _is_gated(checkpoint) and (
        "num_quantiles" in checkpoint.raw_config
        or any(key.startswith("gating.") and key.endswith("running_mean") for key in checkpoint.where)
    )


def _urm(checkpoint: Checkpoint) -> Recipe:
    pairs = checkpoint.tensor("score.weight")
    num_attributes = len(pairs) // 2
    head = heads.WeightedMeansHead(heads.linear(pairs), layers_below(checkpoint, "weights.fc", nn.SELU))
    known = num_attributes == len(URM_ATTRIBUTES)
    return Recipe(
        "URM",
        ModuleHead(head, 1 + num_attributes),
        keys_below(checkpoint, "score", "weights", "lm_head"),
        attributes=URM_ATTRIBUTES if known else tuple(f"attribute-{i}" for i in range(num_attributes)),
    )


def _qwen_prm(checkpoint: Checkpoint) -> Recipe:
    tag = checkpoint.token_id("<extra_0>", 151651)
    return Recipe(
        "Qwen2.5-Math-PRM",
        scalar_head(checkpoint, "score", 2, heads.OddsOf(1)),
        keys_below(checkpoint, "score", "lm_head"),
        ReadPlan(ReadAt.EVERY, Pattern((tag,)), what="step tag <extra_0>"),
        is_probability=True,
        steps=StepFormat(StepStyle.TAGGED, separator="\n\n", tag="<extra_0>"),
    )


def _skywork_prm(checkpoint: Checkpoint) -> Recipe:
    return Recipe(
        "Skywork-o1-Open-PRM",
        scalar_head(checkpoint, "v_head.summary", 1, nn.Sigmoid()),
        keys_below(checkpoint, "v_head", "lm_head"),
        is_probability=True,
        steps=StepFormat(StepStyle.APART, separator="\n", tag="\n"),
    )


def _math_shepherd(checkpoint: Checkpoint) -> Recipe:
    good, bad, tag = (checkpoint.token_id(*known) for known in (("▁+", 648), ("▁-", 387), ("▁ки", 12902)))
    return Recipe(
        "Math-Shepherd",
        odds_head(checkpoint, good, bad),
        keys_below(checkpoint, "lm_head"),
        ReadPlan(ReadAt.EVERY, Pattern((tag,)), what="step tag 'ки'"),
        is_probability=True,
        steps=StepFormat(StepStyle.TAGGED, separator="\n", tag=" ки", joint="\n"),
        template=QUESTION_AND_ANSWER,
    )


def _rlhflow_prm(checkpoint: Checkpoint) -> Recipe:
    plus, minus = checkpoint.token_id("+", 10), checkpoint.token_id("-", 12)
    # The state that says which token follows an assistant's header.
    header = LLAMA3_ASSISTANT[1:]
    return Recipe(
        "RLHFlow PRM",
        odds_head(checkpoint, plus, minus),
        keys_below(checkpoint, "lm_head"),
        ReadPlan(ReadAt.EVERY, Pattern(header, offset=len(header) - 1), what="assistant's turn"),
        is_probability=True,
        steps=StepFormat(StepStyle.TURNS, separator="\n\n", tag="+"),
    )


def _nemotron(checkpoint: Checkpoint) -> Recipe:
    return Recipe("Nemotron", lm_head(checkpoint, 0), keys_below(checkpoint, "lm_head"))


def _athene(checkpoint: Checkpoint) -> Recipe:
    cls = int(checkpoint.raw_config.get("cls_id", LLAMA3_CLS))
    prefix = _prefix(checkpoint)
    return Recipe(
        "Athene",
        scalar_head(checkpoint, prefix),
        keys_below(checkpoint, prefix, "lm_head", "score"),
        appended=cls,
    )


def _internlm2(checkpoint: Checkpoint) -> Recipe:
    token = checkpoint.raw_config.get("reward_token_id")
    if not isinstance(token, int):
        raise LoadFailed(f"{checkpoint.folder}/config.json: reward_token_id is missing; it is what is read")
    return Recipe(
        "InternLM2",
        scalar_head(checkpoint, "v_head"),
        keys_below(checkpoint, "v_head", "output"),
        appended=token,
        convert=_from_internlm2,
    )


INTERNLM2_NAMES = (
    ("tok_embeddings.", "embed_tokens."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)


def _from_internlm2(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """wqkv [kv_heads, queries per kv_head + 2, head_size, hidden_size]: the queries, then a key and a value."""
    config = checkpoint.config
    kv_heads, head_size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    tensors = {}
    for key in checkpoint.where:
        if not key.startswith("model."):
            continue
        name, tensor = key.removeprefix("model."), checkpoint.tensor(key)
        if ".attention.wqkv." in name:
            groups = tensor.reshape(kv_heads, -1, head_size, *tensor.shape[1:])
            for part, rows in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
                own = name.replace(".attention.wqkv.", f".self_attn.{part}_proj.")
                tensors[own] = rows.reshape(-1, *tensor.shape[1:]).contiguous()
            continue
        for theirs, ours in INTERNLM2_NAMES:
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    return tensors


def _beaver(checkpoint: Checkpoint) -> Recipe:
    raw = checkpoint.raw_config
    normalizer = None
    if raw.get("do_normalize") and checkpoint.has("normalizer.var"):
        scale = checkpoint.tensor("normalizer.var").double().sqrt().item() + 1e-8
        is_cost = raw.get("score_type", "reward") == "cost"  # a cost is scaled only: its sign says what is harmful
        normalizer = Normalizer(0.0 if is_cost else checkpoint.tensor("normalizer.mean").item(), scale)
    return Recipe(
        "Beaver",
        scalar_head(checkpoint, "score_head"),
        keys_below(checkpoint, "score_head", "normalizer", "lm_head"),
        normalizer=normalizer,
    )


def _deberta(checkpoint: Checkpoint) -> Recipe:
    dense = heads.linear(checkpoint.tensor("pooler.dense.weight"), checkpoint.tensor("pooler.dense.bias"))
    classifier = heads.linear(checkpoint.tensor("classifier.weight"), checkpoint.tensor("classifier.bias"))
    if classifier.out_features != 1:
        raise LoadFailed(f"{checkpoint.folder}: the head 'classifier' has {classifier.out_features} outputs, not one")
    activation = checkpoint.config.pooler_hidden_act
    if activation not in ACT2FN:
        raise LoadFailed(f"{checkpoint.folder}/config.json: pooler_hidden_act '{activation}' is unknown")
    return Recipe(
        "DeBERTa",
        ModuleHead(nn.Sequential(dense, ACT2FN[activation], classifier), 1),
        keys_below(checkpoint, "pooler", "classifier", "lm_predictions", "mask_predictions"),
        ReadPlan(ReadAt.FIRST),
    )


def _oasst_pythia(checkpoint: Checkpoint) -> Recipe:
    pooling = checkpoint.raw_config.get("pooling") or "last"
    if pooling not in ("mean", "last"):
        raise LoadFailed(f"{checkpoint.folder}/config.json: pooling is '{pooling}', neither mean nor last")
    return Recipe(
        "OASST Pythia",
        scalar_head(checkpoint, "out_proj"),
        keys_below(checkpoint, "out_proj", "embed_out"),
        ReadPlan(ReadAt.MEAN if pooling == "mean" else ReadAt.LAST),
    )


def _has_head(checkpoint: Checkpoint) -> bool:
    """Of a decoder. Classes of encoders put layers of their own before what they call the classifier."""
    return head_prefix(checkpoint) is not None and not _is_encoder(checkpoint)


def _is_encoder(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


FAMILIES: tuple[Family, ...] = (
    Family(
        "ArmoRM",
        "ArmoRM-Llama3-8B",
        "regression (19) at the last token, mixed by a gate read at the last user's end",
        lambda c: _is_gated(c) and not _has_quantiles(c),
        _armorm,
        "the scores' published range (0 to 0.2) was not seen",
    ),
    Family(
        "QRM",
        "QRM-Llama3-8B, QRM-Llama3.1-8B",
        "as ArmoRM, each objective the mean of its quantiles; std of the mixture",
        _has_quantiles,
        _qrm,
        ("19 quantiles unless config.json has num_quantiles; no transform where its matrix is absent"),
    ),
    Family(
        "URM",
        "URM-LLaMa-3-8B, URM-LLaMa-3.1-8B",
        "means of (mean, std) pairs, weighted by an MLP of the same state",
        _is("LlamaForSequenceClassificationWithNormal_Weights"),
        _urm,
        "names of the five attributes",
    ),
    Family(
        "Qwen2.5-Math-PRM",
        "Qwen2.5-Math-PRM-7B/72B, Qwen2.5-Math-7B-PRM800K",
        "p(good) of an MLP at every <extra_0>",
        _is("Qwen2ForProcessRewardModel"),
        _qwen_prm,
    ),
    Family(
        "Skywork-o1-Open-PRM",
        "Skywork-o1-Open-PRM-Qwen-2.5-1.5B/7B",
        "sigmoid of a linear head at every step's last token",
        _is("Qwen2ForPrmModel"),
        _skywork_prm,
    ),
    Family(
        "Math-Shepherd",
        "math-shepherd-mistral-7b-prm",
        "p('+') against '-' of the LM head at every 'ки', after BOS, question and a space",
        _named("math-shepherd"),
        _math_shepherd,
        "ids 648, 387 and 12902 where the tokenizer does not say",
    ),
    Family(
        "RLHFlow PRM",
        "Llama3.1-8B-PRM-Mistral-Data, Llama3.1-8B-PRM-Deepseek-Data",
        "p('+') against '-' of the LM head where each assistant's turn begins",
        _named("prm", "llama3.1-8b"),
        _rlhflow_prm,
        "one pass over all steps equals the published script's pass for each",
    ),
    Family(
        "Nemotron",
        "Llama-3.1-Nemotron-70B-Reward-HF, Llama-3.3-Nemotron-70B-Reward",
        "the LM head's logit of id 0 at the last token",
        _named("nemotron", "reward", but="principle"),  # of those, what is read is not known
        _nemotron,
    ),
    Family(
        "Athene",
        "Athene-RM-8B, Athene-RM-70B",
        "linear head at an appended <|reserved_special_token_1|> (128003)",
        _is("CustomAutoModelForSequenceClassification"),
        _athene,
    ),
    Family(
        "InternLM2",
        "internlm2-1_8b-reward, internlm2-7b-reward, internlm2-20b-reward",
        "linear head at an appended reward token (config.reward_token_id)",
        _is("InternLM2ForRewardModel"),
        _internlm2,
        (
            "names and layout of fused weights as published in InternLM2's code; rotary scaling "
            "beyond the trained length is not dynamic here"
        ),
    ),
    Family(
        "Beaver",
        "beaver-7b-v1.0-reward, beaver-7b-v1.0-cost (and v2.0, v3.0)",
        ("linear head at the last token, normalised by stored mean and variance where config.do_normalize"),
        _is("LlamaForScore", "LlamaModelForScore"),
        _beaver,
        "a cost is not negated: rank by its smallest",
    ),
    Family(
        "DeBERTa",
        "OpenAssistant/reward-model-deberta-v3-large-v2",
        "dense, GELU (config.pooler_hidden_act), linear on the first token of an encoder",
        _is("DebertaV2ForSequenceClassification"),
        _deberta,
    ),
    Family(
        "OASST Pythia",
        "oasst-rm-2-pythia-6.9b, oasst-rm-2.1-pythia-1.4b",
        "linear head on the mean of all tokens, or the last, by config.pooling",
        lambda c: c.raw_config.get("model_type") == "gpt_neox_reward_model",
        _oasst_pythia,
    ),
    Family(
        "scalar head",
        (
            "Skywork-Reward (all), GRM (all), INF-ORM, Qwen2.5-Math-RM, WorldPM, Nemotron (sequence "
            "classification), Starling, UltraRM, Eurus, FsfairX, OffsetBias, Tulu 3 RM, RM-Mistral, "
            "RM-Gemma, AceMath-RM; TRL, LLaMA-Factory, OpenRLHF, PEFT adapters"
        ),
        "linear layer or MLP with ReLUs, with or without biases, at the last token",
        _has_head,
        _scalar,
        "WorldPM's head is a scalar at the last token",
    ),
)


def table() -> str:
    """For the documentation, in Markdown: what loads, and how."""
    rows = [(f.name, f.models, f.how, f.assumes or "nothing") for f in FAMILIES]
    lines = [("family", "published models", "score", "what is only assumed"), ("---",) * 4, *rows]
    cells = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
