"""`rewardserve train DATA --base FOLDER --output DIR`: preferences in, out a model that `rewardserve serve` loads.

Exit codes: 0; 1 if the run could not go on; 2 for wrong usage, a bad row included. A run that was interrupted goes on
from its last checkpoint with --resume.
"""

import difflib
import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.table import Table
from rich.text import Text

from rewardserve.cli.running import complain, counted, guarded
from rewardserve.cli.table import TABLE, make_console
from rewardserve.config import MAX_THREADS
from rewardserve.engine.cgroups import num_cores
from rewardserve.errors import is_out_of_memory
from rewardserve.options import ConfigError, Options, Repeated, load_options
from rewardserve.training import run_folder, split
from rewardserve.training.recipe import ALL_LAYERS, Head, Loss, Recipe, Schedule
from rewardserve.training.rows import Row, read_rows
from rewardserve.types import is_model_name

if TYPE_CHECKING:  # what loads torch
    from rewardserve.training.ensemble import Member, Together
    from rewardserve.training.held_out import Figures
    from rewardserve.training.member import Material

NOT_LEARNED_FROM = ("data", "eval_data", "output", "resume", "threads", "device", "config")


class TrainOptions(Options):
    """Trains a reward model on pairs or rated responses, and writes a folder that `rewardserve serve` loads."""

    data: CliPositionalArg[str] = Field(
        description='JSONL to learn from; rows like {"prompt": "...", "chosen": "...", "rejected": "..."}, '
        "with messages for prompt, responses and ratings for chosen and rejected; margin, label and domain if known"
    )
    base: str = Field(default="", description="checkpoint to begin with: a causal language model or a reward model")
    output: str = Field(default="", description="folder to write; with several --seeds a folder for each in it")
    loss: Loss = Field(
        default="bradley-terry", description="bradley-terry learns from pairs, the others from single ratings"
    )
    head: Head = Field(default="linear", description="what makes a score of the last hidden state")
    new_head: bool = Field(default=False, description="begin with a new head even where the base has one of this kind")
    head_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the head's inputs zeroed in training")
    open_layers: int = Field(
        default=ALL_LAYERS, ge=ALL_LAYERS, description="train the last N layers and the head only; -1: everything"
    )
    lora_rank: int = Field(
        default=0, ge=0, description="train adapters of this rank on the open layers; 0: the weights"
    )
    adapter: bool = Field(default=False, description="write adapter and head only, in PEFT's format, not merged")
    seeds: int = Field(default=1, ge=1, le=64, description="members of an ensemble; each has its own order and dropout")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of a new head, data order and dropout; counts up by member"
    )
    bagging: bool = Field(
        default=False, description="each member learns from its own draw of prompts, so that they differ more"
    )
    epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    max_steps: int = Field(
        default=0, ge=0, description="optimizer steps, instead of --epochs; 0: as many as those have"
    )
    batch_size: int = Field(default=16, ge=1, description="pairs per optimizer step; responses, with the other losses")
    micro_batch_size: int = Field(default=0, ge=0, description="how many of them at once, for less memory; 0: all")
    learning_rate: float = Field(
        default=2e-5, gt=0, le=1, description="the highest; adapters and heads bear 1e-4 to 1e-3"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Schedule = Field(default="cosine", description="how the learning rate falls after the warm-up")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's, of matrices; not of norms and biases")
    center_rewards: float = Field(default=0.0, ge=0, description="weight of what keeps a pair's scores around 0")
    eval_data: str = Field(default="", description="JSONL to measure with; its prompts are left out of training")
    held_out: float = Field(default=0.1, ge=0, lt=1, description="share of DATA's prompts to measure with; 0: none")
    held_out_domain: Repeated = Field(default=[], description="measure with every prompt of this domain; repeatable")
    eval_steps: int = Field(
        default=0, ge=0, description="steps between measurements, and checkpoints; 0: once an epoch"
    )
    early_stopping_patience: int = Field(
        default=0, ge=0, description="stop after so many measurements without a better one, and keep the best; 0: never"
    )
    max_length: int = Field(
        default=0, ge=0, description="leave out what is longer, in tokens; 0: what the base can take"
    )
    pairs_per_prompt: int = Field(default=0, ge=0, description="at most so many pairs of one rated row; 0: all of them")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of products in training and of what is written; auto: as the base is stored"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, a third more work")
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto is a GPU where there is one")
    threads: int = Field(default=0, ge=0, le=MAX_THREADS, description="torch threads on a CPU; 0: all cores")
    resume: bool = Field(default=False, description="go on with the run that OUTPUT holds")

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        self.require(bool(self.base), "--base: name the folder, or hub name, of a checkpoint to begin with")
        self.require(bool(self.output), "--output: name a folder to write to")
        self.require(
            self.micro_batch_size == 0 or self.batch_size % self.micro_batch_size == 0,
            f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size {self.batch_size}",
        )
        self.require(not self.adapter or self.lora_rank > 0, "--adapter writes what --lora-rank makes; give a rank")
        self.require(
            not self.lora_rank or self.open_layers != 0,
            "--lora-rank puts adapters on open layers, and --open-layers 0 leaves none",
        )
        self._check_losses()
        self._check_measure()

    def _check_losses(self) -> None:
        for option in ("center_rewards", "pairs_per_prompt"):
            given = getattr(self, option) > 0
            self.require(
                not given or self.loss == "bradley-terry",
                f"--{option.replace('_', '-')} is of pairs, and --loss {self.loss} learns from single responses",
            )

    def _check_measure(self) -> None:
        own = [flag for flag in ("held_out", "held_out_domain") if flag in self.model_fields_set]
        if self.eval_data and own:
            raise ConfigError(f"--eval-data brings what is measured with; leave out --{own[0].replace('_', '-')}")
        self.require(
            self.is_measured or not self.early_stopping_patience,
            "--early-stopping-patience needs something to measure with: --held-out, --held-out-domain or --eval-data",
        )

    @property
    def is_measured(self) -> bool:
        return bool(self.eval_data or self.held_out or self.held_out_domain)


def run(arguments: Sequence[str]) -> int:
    return guarded("train", lambda: _train(load_options(TrainOptions, "train", arguments)))


def _train(options: TrainOptions) -> int:
    options.check()
    rows, measured = _read(options)
    from rewardserve.models.checkpoint import first_line
    from rewardserve.training import ensemble, member  # loads torch and TRL, which takes seconds

    material, recipe, about = _prepare(options, rows, measured)
    output = Path(options.output)
    asked = options.model_dump(mode="json") | {"digest": about["digest"]}
    run_folder.begin(output, asked, options.resume)
    seeds = range(options.seed, options.seed + options.seeds)
    try:
        members, together = ensemble.train_members(
            material, recipe, seeds, output, about, options.resume, show_progress=sys.stderr.isatty()
        )
    except BaseException as error:
        run_folder.give_up(output)
        if is_out_of_memory(error):
            raise member.OutOfMemory(
                f"{first_line(error)}; a smaller --micro-batch-size takes less memory, and so do "
                "--gradient-checkpointing, a lower --max-length and --lora-rank"
            ) from error
        raise
    run_folder.complete(output)
    _show(members, together)
    return 0


def _read(options: TrainOptions) -> tuple[list[Row], list[Row]]:
    """(to train on, to measure with). Raises ConfigError, BadRow included."""
    rows = read_rows(options.data)
    if not options.eval_data:
        _check_domains(options.held_out_domain, rows)
        return split.split(rows, options.held_out, options.held_out_domain)
    measured = read_rows(options.eval_data)
    kept = split.without_prompts_of(rows, measured)
    if len(kept) < len(rows):
        left_out = counted(len(rows) - len(kept), "row")
        complain("train", f"{left_out} of {options.data} left out: their prompts are in {options.eval_data}")
    return kept, measured


def _check_domains(asked: Sequence[str], rows: Sequence[Row]) -> None:
    known = sorted({row.domain for row in rows if row.domain})
    for name in asked:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            near = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known[:8]) or 'none'}"
            raise ConfigError(f"--held-out-domain {name}: no row of DATA has this domain; {near}")


def _prepare(options: TrainOptions, rows: list[Row], measured: list[Row]) -> "tuple[Material, Recipe, dict[str, Any]]":
    """Raises ConfigError and LoadFailed."""
    import torch

    from rewardserve.models.checkpoint import resolve_folder
    from rewardserve.training import base, data
    from rewardserve.training.member import Material

    torch.set_num_threads(options.threads or min(torch.get_num_threads(), num_cores()))
    folder = resolve_folder(options.base)
    config = base.read_config(folder)
    longest = base.max_length_of(config)
    max_length = min(options.max_length or longest, longest)
    encoder = data.make_encoder(folder, config, max_length)
    encoded = data.encode(rows, encoder, options.data)
    of_measure = data.encode(measured, encoder, options.eval_data or options.data)
    train = data.training_set(encoded, options.loss, options.pairs_per_prompt, options.data)
    held_out = data.held_out_set(of_measure, options.loss, options.eval_data or options.data)
    if options.is_measured and not held_out.judged:
        where = f"--eval-data {options.eval_data}" if options.eval_data else "--held-out"
        raise ConfigError(
            f"{where}: no two responses to compare are in it; give more, or --held-out 0 to measure nothing"
        )
    too_long = data.count_too_long(encoded) + data.count_too_long(of_measure)
    if too_long:
        complain("train", f"{counted(too_long, 'response')} left out: longer than {max_length} tokens")
    dtype = base.choose_dtype(options.dtype, folder)
    material = Material(
        folder, options.base, train, held_out if options.is_measured else None, dtype, as_adapter=options.adapter
    )
    about = {
        "base": options.base,
        "data": Path(options.data).name,
        "digest": _digest(options.data, options.eval_data),
        "num_examples": len(train),
        "num_too_long": too_long,
        "options": options.model_dump(mode="json", exclude=set(NOT_LEARNED_FROM)),
    }
    return material, _recipe(options, half=dtype is torch.bfloat16, use_cpu=_on_cpu(options.device)), about


def _recipe(options: TrainOptions, half: bool, use_cpu: bool) -> Recipe:
    shared = {name: getattr(options, name) for name in Recipe.__slots__ if name in TrainOptions.model_fields}
    return Recipe(**shared, half=half, use_cpu=use_cpu)


def _on_cpu(device: str) -> bool:
    """Raises ConfigError where it is not clear on which of several GPUs."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return True
    if torch.cuda.device_count() > 1:
        raise ConfigError("--device auto: there are several GPUs; name the one to train on in CUDA_VISIBLE_DEVICES")
    return False


def _digest(*paths: str) -> str:
    """Names the data by content."""
    digest = hashlib.blake2b(digest_size=6)
    for path in filter(None, paths):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# -- what is shown -----------------------------------------------------------------------------------------------------


def _show(members: "Sequence[Member]", together: "Together | None") -> None:
    console = make_console()
    rows = [(member.folder.name, member.figures) for member in members if member.figures is not None]
    if together is not None:
        rows.append(("mean", together.figures))
    if rows:
        console.print(_table(rows))
        console.print()
    if together is not None:
        text = f"members differ on the order of {together.disagreement:.1%} of the held-out comparisons"
        console.print(Text(text), soft_wrap=True)
    for member in members:
        console.print(Text(f"wrote {member.folder}"), soft_wrap=True)
    flags = [f"--model {shlex.quote(f'{_name(member.folder)}={member.folder}')}" for member in members]
    if len(members) > 1:
        flags.append(f'--ensemble "rm=mean({"+".join(_name(member.folder) for member in members)})"')
    console.print(Text(f"next: rewardserve serve {' '.join(flags)}"), soft_wrap=True)


def _name(folder: Path) -> str:
    return folder.name if is_model_name(folder.name) else "rm"


def _table(rows: "Sequence[tuple[str, Figures]]") -> Table:
    """Share of the held-out comparisons in the right order, over all and by domain."""
    first = rows[0][1]
    table = Table(**TABLE)
    table.add_column("held out", no_wrap=True)
    for name, share in (("all", first.overall), *first.domains.items()):
        table.add_column(f"{name} ({share.pairs})", justify="right", no_wrap=True)
    for name, figures in rows:
        shares = (figures.overall, *figures.domains.values())
        table.add_row(Text(name), *(f"{share.accuracy:.1%}" for share in shares))
    return table
