"""Train the demo reward model from scratch and write it, with its model card, to a folder.

    python examples/train_demo_model.py --output examples/demo_model

Everything happens on the CPU, in the trainer behind `rewardserve train`; this file only prepares what it is given:

1. The prompts are split by hash into train, validation and test (`demo_data.py`).
2. A byte-level BPE tokenizer is trained on the training part.
3. A model is set up whose attention starts out comparing tokens with each other (`start_matching`). Whether an answer
   shares words with its prompt is then visible from the first step. Ordinary random weights did not get there in runs
   of this size, but were tried at higher learning rates only.
4. It is trained on many short pairs of a related and an unrelated answer.
5. Training goes on with judge preferences, human preferences, good answers against broken ones, and more of the
   short pairs, without which the model forgets what it learned from them.
6. The written model is measured on the test part, and the figures go into its model card.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import demo_data
import evaluate_demo_model
import torch
from demo_data import CORRUPTIONS, CandidatePrompt, Pair, Split
from evaluate_demo_model import Figure
from rewardserve.training import data, member
from rewardserve.training.recipe import Recipe
from rewardserve.training.rows import Comparison, Row
from rewardserve.training.save import save_model
from rewardserve.types import Conversation, Message
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, set_seed
from transformers import Qwen3ForSequenceClassification as RewardModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

logger = logging.getLogger("train_demo_model")

Turn = dict[str, str]
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
MAX_POSITIONS = 2048
MODEL_CARD = Path(__file__).with_name("demo_model_card.md.in")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
# Words with their leading space, single digits, runs of punctuation, line breaks: as Qwen's tokenizers split text.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest and harmless assistant.",
    "Answer the user's question clearly and briefly.",
)
SYSTEM_PROMPT_SHARE = 0.08
WORD = re.compile(r"[A-Za-z]+")
COMMON_WORDS = 120  # the most frequent ones, which say nothing about the topic


class PairSampler:
    """Draws training pairs of every kind from the training part.

    Off-topic pairs come in twos with the answers exchanged, so that nothing about an answer by itself (its length,
    its style) tells which is better: only its relation to the prompt does.
    """

    def __init__(self, train: Split, seed: int) -> None:
        """Prepare to draw from `train`; the same seed draws the same pairs."""
        self.rng = random.Random(seed)
        self.prompts = train.candidates
        self.harmless = demo_data.harmless_pairs(train.harmless)
        by_prompt = (demo_data.preference_pairs([prompt], min_gap=0.1) for prompt in train.candidates)
        self.preferences = [pairs for pairs in by_prompt if pairs]
        counts = Counter(word for text in training_texts(train) for word in WORD.findall(text))
        self.common_words = {word for word, _ in counts.most_common(COMMON_WORDS)}
        self.words = sorted(word for word, count in counts.items() if count >= 3 and len(word) >= 3)

    def related(self, number: int) -> list[Pair]:
        """Short pairs of a related and an unrelated answer."""
        shares: list[tuple[float, Callable[[], list[Pair]]]] = [
            (0.3, self._word_lists),
            (0.35, self._passages),
            (0.35, partial(self._off_topic, excerpt=True)),
        ]
        return self._mix(shares, number)

    def mixture(self, number: int) -> list[Pair]:
        """Pairs of all kinds, mixed."""
        shares: list[tuple[float, Callable[[], list[Pair]]]] = [
            (0.14, self._preference),
            (0.12, self._off_topic),
            (0.20, partial(self._off_topic, excerpt=True)),
            (0.12, self._passages),
            (0.10, partial(self._corrupted, "shuffled")),
            (0.11, partial(self._corrupted, "truncated")),
            (0.12, partial(self._corrupted, "repeated")),
            (0.02, self._lazy),
            (0.04, lambda: [self.rng.choice(self.harmless)]),
            (0.02, self._harmless_off_topic),
            (0.02, self._harmless_corrupted),
        ]
        return self._mix(shares, number)

    def broken(self, number: int) -> list[Pair]:
        """As `mixture`, but mostly good answers against broken ones."""
        shares: list[tuple[float, Callable[[], list[Pair]]]] = [
            (0.12, self._preference),
            (0.06, self._off_topic),
            (0.10, partial(self._off_topic, excerpt=True)),
            (0.06, self._passages),
            (0.20, partial(self._corrupted, "shuffled")),
            (0.22, partial(self._corrupted, "truncated")),
            (0.22, partial(self._corrupted, "repeated")),
            (0.02, lambda: [self.rng.choice(self.harmless)]),
        ]
        return self._mix(shares, number)

    def finishing(self, number: int) -> list[Pair]:
        """As `broken`, with judge preferences, which that stage had made too little of."""
        shares: list[tuple[float, Callable[[], list[Pair]]]] = [
            (0.36, self._preference),
            (0.05, self._off_topic),
            (0.12, partial(self._off_topic, excerpt=True)),
            (0.12, partial(self._corrupted, "shuffled")),
            (0.20, partial(self._corrupted, "truncated")),
            (0.15, partial(self._corrupted, "repeated")),
        ]
        return self._mix(shares, number)

    def _mix(self, shares: list[tuple[float, Callable[[], list[Pair]]]], number: int) -> list[Pair]:
        pairs = [pair for share, sample in shares for pair in self._draw(sample, round(share * number))]
        self.rng.shuffle(pairs)
        return pairs

    def _draw(self, sample: Callable[[], list[Pair]], number: int) -> list[Pair]:
        pairs: list[Pair] = []
        while len(pairs) < number:
            pairs += (pair for pair in sample() if pair.chosen != pair.rejected)
        return pairs

    def _answer(self, prompt: CandidatePrompt) -> str:
        """Mostly one of the best answers, sometimes any, so that few texts are seen too often."""
        return self.rng.choice(prompt.answers[: self.rng.choice((3, 3, 10, 25))]).text

    def _preference(self) -> list[Pair]:
        return [self.rng.choice(self.rng.choice(self.preferences))]

    def _off_topic(self, excerpt: bool = False) -> list[Pair]:
        two = self.rng.sample(self.prompts, 2)
        answers = [self._answer(prompt) for prompt in two]
        if excerpt:
            answers = [_excerpt(answer, self.rng) for answer in answers]
        return _exchanged([prompt.messages for prompt in two], answers)

    def _passages(self) -> list[Pair]:
        """One passage of an answer as the prompt, another as the answer: more varied prompts than the data has.

        Half of the time some words are renamed, so that only their recurrence tells what belongs together.
        """
        halves = [_two_passages(self._answer(prompt), self.rng) for prompt in self.rng.sample(self.prompts, 2)]
        texts = [text for half in halves for text in half]
        if self.rng.random() < 0.5:
            texts = self._renamed(texts, self.rng.choice((0.3, 0.6, 1.0)))
        return _exchanged([_question(texts[0]), _question(texts[2])], [texts[1], texts[3]])

    def _renamed(self, texts: list[str], share: float) -> list[str]:
        """The texts with a share of their less common words replaced by random ones, everywhere alike."""
        names: dict[str, str] = {}

        def rename(match: re.Match[str]) -> str:
            word = match.group()
            if len(word) < 3 or word in self.common_words:
                return word
            return names.setdefault(word, self.rng.choice(self.words) if self.rng.random() < share else word)

        return [WORD.sub(rename, text) for text in texts]

    def _word_lists(self) -> list[Pair]:
        """Random words as the prompt, some of them among others as the answer: relatedness and nothing else."""
        size = self.rng.randint(3, 8)
        prompts = [self.rng.choices(self.words, k=size) for _ in range(2)]
        shared, others = self.rng.randint(1, size), self.rng.randint(0, 6)
        answers = [self.rng.sample(words, shared) + self.rng.choices(self.words, k=others) for words in prompts]
        for words in answers:
            self.rng.shuffle(words)
        return _exchanged([_question(" ".join(words)) for words in prompts], [" ".join(words) for words in answers])

    def _corrupted(self, kind: str) -> list[Pair]:
        prompt = self.rng.choice(self.prompts)
        good = self._answer(prompt)
        source = good if self.rng.random() < 0.6 else self._answer(prompt)
        if kind == "truncated":
            return [Pair(kind, prompt.messages, good, demo_data.truncate(source, self.rng, low=0.1, high=0.9))]
        return [Pair(kind, prompt.messages, good, CORRUPTIONS[kind](source, self.rng))]

    def _lazy(self) -> list[Pair]:
        prompt = self.rng.choice(self.prompts)
        return [Pair("lazy", prompt.messages, self._answer(prompt), self.rng.choice(demo_data.LAZY_ANSWERS))]

    def _harmless_off_topic(self) -> list[Pair]:
        two = self.rng.sample(self.harmless, 2)
        return _exchanged([pair.messages for pair in two], [pair.chosen for pair in two])

    def _harmless_corrupted(self) -> list[Pair]:
        pair = self.rng.choice(self.harmless)
        corrupt = self.rng.choice(list(CORRUPTIONS.values()))
        return [Pair("harmless_corrupted", pair.messages, pair.chosen, corrupt(pair.chosen, self.rng))]


def _exchanged(prompts: list[list[Turn]], answers: list[str]) -> list[Pair]:
    """Two prompts, each with its own answer as the better and the other's as the worse."""
    return [
        Pair("off_topic", prompts[0], answers[0], answers[1]),
        Pair("off_topic", prompts[1], answers[1], answers[0]),
    ]


def _question(text: str) -> list[Turn]:
    return [{"role": "user", "content": text}]


def _two_passages(text: str, rng: random.Random) -> tuple[str, str]:
    """Two passages of up to 30 words, the second from after the first, not overlapping it."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    middle = rng.randint(max(1, len(spans) // 3), max(1, 2 * len(spans) // 3))
    first = _passage(text, spans[:middle], rng.randint(6, 30), rng)
    return first, _passage(text, spans[middle:] or spans, rng.randint(6, 30), rng)


def _passage(text: str, spans: list[tuple[int, int]], length: int, rng: random.Random) -> str:
    """`length` words of the text in a row, or fewer where there are fewer; often the first ones."""
    start = rng.choice((0, rng.randrange(max(1, len(spans) - length + 1))))
    passage = spans[start : start + length]
    return text[passage[0][0] : passage[-1][1]]


def _excerpt(text: str, rng: random.Random) -> str:
    """A passage of 15 to 60 words, often the opening: relatedness is as visible there, at a fraction of the cost."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    return _passage(text, spans, rng.randint(15, 60), rng)


def training_texts(train: Split) -> list[str]:
    """Every message and answer of the training part."""
    texts = [text for prompt in train.candidates for text in (prompt.prompt, *(a.text for a in prompt.answers))]
    for pair in train.harmless:
        texts += [*(message["content"] for message in pair.messages), pair.chosen, pair.rejected]
    return texts


def train_tokenizer(train: Split, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template on the training part."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, START, END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(training_texts(train), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        model_max_length=MAX_POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_config(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Qwen3Config:
    """A small Qwen3 with one output."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
        num_labels=1,
        id2label={0: "reward"},
        label2id={"reward": 0},
    )


@torch.no_grad()
def start_matching(model: RewardModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the attention start out comparing tokens with each other; everything stays trainable.

    - Embeddings are large beside what the layers add at first, so that a token stays recognisable.
    - One head of the first layer looks for the role names: each token learns whose turn it is in.
    - Half of the heads of the next two layers have equal query and key weights: a token looks at its own earlier
      occurrences, and so an answer's words at the prompt's.

    These heads use the slowly rotating dimensions only, where the distance between two tokens hardly matters.
    """
    embeddings = model.model.embed_tokens.weight
    shared = torch.randn(model.config.hidden_size)  # a direction that all tokens have in common
    embeddings.copy_(0.05 * torch.randn_like(embeddings) + 0.03 * shared)
    embeddings[tokenizer.pad_token_id] = 0
    shared /= shared.norm()
    roles = embeddings[[tokenizer(role)["input_ids"][0] for role in ("user", "assistant")]].mean(dim=0)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= 0.3
        layer.self_attn.o_proj.weight *= 0.5
    first, *next_two = (layer.self_attn for layer in model.model.layers[:3])
    _look_for(first, roles, shared)
    for attention in next_two:
        _look_for_equals(attention, shared)
    for attention in (first, *next_two):
        attention.q_norm.weight *= 1.5  # sharper attention


def keep_matching(model: RewardModel, layers: int) -> None:
    """Freeze the attention of the first layers, which by now finds what two texts share; it is easily unlearned."""
    for layer in model.model.layers[:layers]:
        layer.self_attn.requires_grad_(False)


def _look_for(attention: Qwen3Attention, wanted: torch.Tensor, shared: torch.Tensor) -> None:
    """Turn the first head of every token towards tokens like `wanted`."""
    width = attention.head_dim
    wanted = wanted - (wanted @ shared) * shared
    meeting_point = torch.randn(width) * _slow(width)
    meeting_point /= meeting_point.norm()
    query, key = (projection.weight[:width] for projection in (attention.q_proj, attention.k_proj))
    query.copy_(torch.outer(meeting_point, shared))
    key.copy_(key * _slow(width)[:, None] + 0.4 * torch.outer(meeting_point, wanted / wanted.norm()))


def _look_for_equals(attention: Qwen3Attention, shared: torch.Tensor) -> None:
    """Give half of the heads equal query and key weights, blind to what all tokens share."""
    width = attention.head_dim
    rows = attention.q_proj.out_features // width // 2 * width
    query, key = (projection.weight[:rows] for projection in (attention.q_proj, attention.k_proj))
    query -= torch.outer(query @ shared, shared)
    query *= _slow(width).repeat(rows // width)[:, None]
    key.copy_(query)


def _slow(width: int) -> torch.Tensor:
    """Which of a head's dimensions the rotary position embedding turns slowly."""
    return torch.arange(width) % (width // 2) >= 0.45 * (width // 2)


def to_row(pair: Pair, line: int, rng: random.Random) -> Row:
    """A pair as training takes it, now and then with a system message before it."""
    turns = [Message(m["role"], m["content"]) for m in pair.messages]
    if rng.random() < SYSTEM_PROMPT_SHARE:
        turns.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
    return Row(line, Conversation(tuple(turns)), (pair.chosen, pair.rejected), (Comparison(0, 1),), None, pair.kind)


def train_reward_model(
    model: RewardModel,
    pairs: list[Pair],
    tokenizer_folder: Path,
    args: argparse.Namespace,
    accumulate: int,
    learning_rate: float,
    warmup_steps: int = 40,
) -> None:
    """Pass once over the pairs; pairs over the length limit are left out."""
    recipe = Recipe(
        batch_size=args.batch_size,
        micro_batch_size=args.batch_size // accumulate,
        learning_rate=learning_rate,
        warmup=warmup_steps,
        weight_decay=0.01,
        center_rewards=0.001,
        half=args.bf16,
        use_cpu=True,
    )
    rng = random.Random(args.seed)
    rows = [to_row(pair, line, rng) for line, pair in enumerate(pairs)]
    encoder = data.make_encoder(tokenizer_folder, model.config, args.max_length)
    encoded = data.encode(rows, encoder, "the drawn pairs")
    examples = data.training_set(encoded, recipe.loss, 0, "the drawn pairs")
    material = member.Material(tokenizer_folder, "", examples, None, torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = member.make_trainer(model, material, recipe, args.seed, Path(scratch), show_progress=True)
        trainer.args.adam_beta2 = 0.98
        trainer.args.save_strategy = "no"
        trainer.train()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer under a class name that all recent transformers know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def model_card(
    model: RewardModel, splits: dict[str, Split], figures: dict[str, Figure], minutes: float, args: argparse.Namespace
) -> str:
    """The model card with the measured figures filled in."""
    config = model.config
    facts = {
        "parameters": f"{model.num_parameters() / 1e6:.1f} million",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "max_length": args.max_length,
        "related_pairs": f"{args.related_pairs:,}",
        "pairs": f"{args.pairs:,}",
        "broken_pairs": f"{args.broken_pairs:,}",
        "finishing_pairs": f"{args.finishing_pairs:,}",
        "minutes": f"{minutes:.0f}",
        "threads": torch.get_num_threads(),
        "figures": evaluate_demo_model.figures_table(figures),
        **{f"{name}_prompts": len(split.candidates) for name, split in splits.items()},
        **{f"{name}_conversations": f"{len(split.harmless):,}" for name, split in splits.items()},
    }
    return MODEL_CARD.read_text(encoding="utf-8").format(**facts)


def parse_args() -> argparse.Namespace:
    """Command line."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=demo_data.DEFAULT_DATA_DIR, help="folder of the data files")
    parser.add_argument("--output", type=Path, default=here / "demo_model", help="folder to write the model to")
    parser.add_argument("--related-pairs", type=int, default=3_200, help="pairs of the first stage: related or not")
    parser.add_argument("--pairs", type=int, default=5_000, help="pairs of the second stage: all kinds")
    parser.add_argument("--broken-pairs", type=int, default=3_400, help="pairs of the third stage: broken answers")
    parser.add_argument("--finishing-pairs", type=int, default=900, help="pairs of the last stage: all kinds again")
    parser.add_argument("--finishing-learning-rate", type=float, default=1.5e-4, help="highest of the last stage")
    parser.add_argument("--related-learning-rate", type=float, default=2e-4, help="highest of the first stage")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="highest of the second and the third stage")
    parser.add_argument("--keep", type=int, default=3, help="layers whose attention the later stages leave as it is")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--accumulate", type=int, default=2, help="parts in which the second stage computes a step")
    parser.add_argument("--max-length", type=int, default=640, help="longest conversation trained on, in tokens")
    parser.add_argument("--vocab-size", type=int, default=8192, help="size of the tokenizer's vocabulary")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the model")
    parser.add_argument("--intermediate-size", type=int, default=640, help="width of the feed-forward layers")
    parser.add_argument("--layers", type=int, default=4, help="number of decoder layers")
    parser.add_argument("--heads", type=int, default=4, help="number of attention heads")
    parser.add_argument("--head-dim", type=int, default=64, help="width of an attention head")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, pairs and order")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16 (needs AVX-512 or AMX)"
    )
    return parser.parse_args()


def main() -> None:
    """Train, measure and write."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    torch.set_num_threads(args.threads)
    splits = demo_data.load_splits(args.data_dir)
    logger.info("training the tokenizer")
    tokenizer = train_tokenizer(splits["train"], args.vocab_size)
    folder = Path(tempfile.mkdtemp())
    save_tokenizer(tokenizer, folder)
    start = time.monotonic()
    logger.info("training the reward model")
    sampler = PairSampler(splits["train"], args.seed)
    model = RewardModel(model_config(tokenizer, args))
    start_matching(model, tokenizer)
    train_reward_model(model, sampler.related(args.related_pairs), folder, args, 1, args.related_learning_rate)
    keep_matching(model, args.keep)
    train_reward_model(model, sampler.mixture(args.pairs), folder, args, args.accumulate, args.learning_rate)
    train_reward_model(model, sampler.broken(args.broken_pairs), folder, args, args.accumulate, args.learning_rate)
    finishing = sampler.finishing(args.finishing_pairs)
    train_reward_model(model, finishing, folder, args, args.accumulate, args.finishing_learning_rate, warmup_steps=8)
    minutes = (time.monotonic() - start) / 60
    save_model(model, args.output, torch.bfloat16, text_from=folder, config=model_config(tokenizer, args))
    shutil.rmtree(folder)

    logger.info("measuring the written model")
    model, tokenizer = evaluate_demo_model.load(args.output)
    for part in ("validation", "test"):
        figures = evaluate_demo_model.evaluate(model, tokenizer, splits[part])
        logger.info("%s after %.1f minutes of training\n%s", part, minutes, evaluate_demo_model.figures_table(figures))
    card = model_card(model, splits, figures, minutes, args)
    (args.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
