"""What makes a packed model faster, or closer to fp32, without another score beyond rounding. Each step is kept only if
the canary agrees.

Measured on two cores of a CPU with bf16 units, a 100M Qwen3 on real text: keeping freed memory 1.2 x, prepacked
weights 1.05 x, compiled layers 1.1 x, attention built for the CPU 1.1 to 1.2 x, products built for it 1.02 x; with the
residual in fp32 the mean error falls by a tenth to a third, with sums in fp32 by a sixth more.
"""

import copy
import ctypes
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from rewardserve_kernels.attention import avx512, chunked
from rewardserve_kernels.cpu_code import CannotBuild
from rewardserve_kernels.kv_cache import paged
from rewardserve_kernels.linear import avx512 as products
from rewardserve_kernels.linear import experts
from rewardserve_kernels.linear.fp8 import Fp8Linear, can_be_fp8
from rewardserve_kernels.linear.int8 import Int8Linear
from rewardserve_kernels.linear.prepacked import PrepackedLinear, can_prepack
from rewardserve_kernels.linear.replace import put_back, replace_linears, replace_modules
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from torch import nn

from rewardserve.engine.native import mixture
from rewardserve.engine.native.canary import MOST_BY_ROUNDINGS, Canary
from rewardserve.errors import LoadFailed, OptionsDoNotFit
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.packed_attention import Pack
from rewardserve.models.reward_model import RewardModel

log = logging.getLogger(__name__)

MIN_PARAMETERS_TO_COMPILE = 50_000_000  # on a CPU; smaller models are up and busy before a compiler is done
EIGHT_BIT_TOLERANCE = 0.2  # of the final hidden states; seen: 0.02 to 0.05 in int8
PROBE_FLOP = 2e11  # of one probe forward: a quarter of a second on two cores
PROBE_ROUNDS = 5
MIN_GAIN = 0.95  # where it makes no difference, the same answer every time: compiled or not, scores differ by rounding
MAX_REASON = 300  # characters: torch's own reasons fill pages
KEPT_BYTES = 64 << 20  # larger pieces are few, and would leave the heap full of holes
DIFFERS = "it differs"  # a flaw that is no failure
NOTHING_TO_REPLACE = "there are no layers that are known, or no products in them that can be replaced"
_clock = time.perf_counter
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = 1, -1, -3, -8  # malloc.h


def keep_freed_memory() -> None:
    """Keeps what a forward frees for the next one, instead of giving it back to the system page by page.

    Activations of a few megabytes are otherwise mapped and unmapped by every operation, and the page faults cost a
    fifth of the time. One arena, since those of other threads are small and give back early. Where the C library is
    not glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MXFAST, 0)  # see engine/environment.py
    mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(slots=True)
class Subject:
    """A packed model, and what is needed to tell whether a change to it is right and whether it pays."""

    model: RewardModel
    num_parameters: int
    canary: Canary
    tolerance: float  # of the canary, for the precision it runs in
    max_batch_tokens: int

    @property
    def on_cpu(self) -> bool:
        return self.model.backbone.device.type == "cpu"

    @property
    def in_bf16_on_cpu(self) -> bool:
        return self.on_cpu and self.model.backbone.module.dtype == torch.bfloat16

    def flaw(self, compiled_to: float | None = None) -> str | None:
        """What the canary says against the model as it is now, or None.

        `compiled_to`: its layers are compiled, and may differ that much where this is more than the tolerance.
        """
        tolerance = max(self.tolerance, compiled_to or 0)
        try:
            if compiled_to is None:
                error = self.canary.differs_by(self.model, tolerance)
            else:
                _, error = self.canary.run(self.model)
        except torch.OutOfMemoryError:  # nothing is wrong with it, and what is left out would be left out for good
            raise
        except Exception as failure:  # no C++ compiler, a layer that cannot be traced, a weight that is looked for
            failure = getattr(failure, "inner_exception", failure)  # what torch.compile wraps
            return " ".join([type(failure).__name__ + ":", *str(failure).split()])[:MAX_REASON]
        return None if error <= tolerance else f"{DIFFERS} by {error:.1e} from the padded forward"


def speed_up(subject: Subject, compile_option: str, quantize: str, own_kernels: bool = True) -> None:
    """Quantizes where that is asked for; lays weights out, builds and compiles where that works and pays.

    Without `own_kernels` what torch brings computes all.

    Raises LoadFailed where what was asked for by name does not work.
    """
    if own_kernels and subject.in_bf16_on_cpu and compile_option != "off":
        _build_attention(subject)
    if quantize:
        _quantize(subject, quantize)
        _keep_residual_in_fp32(subject)
    elif own_kernels and subject.in_bf16_on_cpu and _lay_out(subject, can_build=compile_option != "off"):
        _keep_residual_in_fp32(subject)
    if own_kernels and not subject.on_cpu:
        _use_triton(subject)
    if compile_option == "off":
        return
    if compile_option == "auto" and subject.on_cpu and subject.num_parameters < MIN_PARAMETERS_TO_COMPILE:
        return
    reason = _compile(subject)
    if reason is None and compile_option == "auto" and subject.on_cpu:
        reason = _compare_speed(subject, "compiled layers", subject.model.backbone.set_compiled)
    if reason is None:
        return
    subject.model.backbone.set_compiled(False)
    if compile_option == "on":
        raise OptionsDoNotFit(f"compile = on, but {reason}; use compile = auto or off")
    log.warning("layers run uncompiled: %s", reason)


def _quantize(subject: Subject, kind: str) -> None:
    """To 8-bit numbers. Raises LoadFailed where that cannot be, or gives something else than rounding explains."""
    layers = subject.model.backbone.decoder_layers
    if kind == "int8":
        if not subject.on_cpu or not layers:
            raise LoadFailed("quantize = int8 is for decoders on a CPU; leave it out")
        count = sum(len(replace_linears(layer, Int8Linear)) for layer in layers)
    else:
        if not layers or not _has_fp8(subject.model.backbone.device):
            raise LoadFailed("quantize = fp8 is for decoders on GPUs of compute capability 8.9 and later; leave it out")
        if subject.on_cpu:
            log.warning("fp8 on a CPU is slower than what it takes the place of: for trying out what it does to scores")
        # The first layer reads embeddings and the last one is what is scored: they stay as they are.
        count = sum(len(replace_linears(layer, _fp8_or_none)) for layer in layers[1:-1])
    if not count:
        raise LoadFailed(f"quantize = {kind} finds no linear layer in this model; leave it out")
    subject.tolerance = EIGHT_BIT_TOLERANCE
    if flaw := subject.flaw():
        raise LoadFailed(f"quantize = {kind} does not work for this model: {flaw}; leave it out")


def _fp8_or_none(linear: nn.Linear) -> nn.Module | None:
    return Fp8Linear(linear) if can_be_fp8(linear) else None


def _has_fp8(device: torch.device) -> bool:
    """Also torch on a CPU: slowly, for trying out what it does to scores."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _lay_out(subject: Subject, can_build: bool) -> bool:
    """Weights as this CPU's products want them, ours where they work or else the library's; True if either does."""
    if can_build:
        reason = _use_built(subject)
        if reason is None:
            return True
        log.log(logging.WARNING if DIFFERS in reason else logging.INFO, "products by the library: %s", reason)
    reason = _replace(subject, lambda module: _prepacked(module, subject.max_batch_tokens))
    if reason is not None:
        level = logging.INFO if reason == NOTHING_TO_REPLACE else logging.WARNING
        log.log(level, "weights are left as they lie in the checkpoint: %s", reason)
    return reason is None


def _use_built(subject: Subject) -> str | None:
    """Products compiled for this very CPU, and norms that take what they give; why that cannot be, or None."""
    try:
        products.load()
    except CannotBuild as failure:
        return str(failure)
    return _replace(subject, _built)


def _built(module: nn.Module) -> nn.Module | None:
    if products.can_replace(module):
        return products.Avx512Linear(module)
    return products.gated_mlp(module) or experts.experts(module) or mixture.in_bf16(module) or _norm_in_fp32(module)


def _prepacked(module: nn.Module, num_rows: int) -> nn.Module | None:
    if type(module) is nn.Linear and can_prepack(module):
        return PrepackedLinear(module, num_rows)
    return _norm_in_fp32(module)


def _norm_in_fp32(module: nn.Module) -> nn.Module | None:
    """torch's LayerNorm with the same weights in fp32: only so does it take hidden states in fp32."""
    return copy.deepcopy(module).float() if type(module) is nn.LayerNorm else None


def _replace(subject: Subject, make: Callable[[nn.Module], nn.Module | None]) -> str | None:
    """In some layers on trial, with their weights twice in memory meanwhile, then in the others; why that failed, or
    None.
    """
    layers = subject.model.backbone.decoder_layers
    on_trial = _of_every_kind([frozenset(_parts(layer).items()) for layer in layers])
    replaced = [each for number in on_trial for each in replace_modules(layers[number], make)]
    if all(isinstance(module, nn.LayerNorm) for _, _, module in replaced):
        put_back(replaced)
        return NOTHING_TO_REPLACE
    if flaw := subject.flaw():
        put_back(replaced)
        return flaw
    for number, layer in enumerate(layers):
        if number not in on_trial:
            replace_modules(layer, make)
    return None


def _of_every_kind(kinds: Sequence[Hashable]) -> list[int]:
    """The last two layers, and likewise the last two neighbours of every other two kinds (dense ones before experts).

    Two, since what comes from a layer may be more precise than before: the first gives it to the second, and the last
    layer to the final norm.
    """
    last = {pair: number for number, pair in enumerate(pairwise(kinds))}
    return sorted({*range(len(kinds))[-1:], *(each for first in last.values() for each in (first, first + 1))})


def _parts(layer: nn.Module) -> Counter[type[nn.Module]]:
    """How many there are of each kind of module without modules in it."""
    return Counter(type(module) for module in layer.modules() if next(module.children(), None) is None)


def _keep_residual_in_fp32(subject: Subject) -> None:
    """Costs nothing that can be measured.

    Not where a router chooses experts by what it gets: whether roundings send the canary's tokens elsewhere is chance,
    and weights that are copied over these are to run as if they had been loaded.
    """
    if mixture.is_mixture(subject.model.backbone.module):
        return
    subject.model.backbone.residual_in_fp32 = True
    if flaw := subject.flaw():
        log.info("hidden states stay in bf16 between layers: %s", flaw)
        subject.model.backbone.residual_in_fp32 = False


def _build_attention(subject: Subject) -> None:
    """Attention that is compiled for this very CPU, where it has the instructions for it: always faster by far."""
    backbone = subject.model.backbone
    try:
        avx512.load()
    except CannotBuild as failure:
        log.info("attention by the library's products: %s", failure)
        return
    backbone.attention = avx512
    if flaw := subject.flaw():
        backbone.attention = chunked
        log.warning("attention by the library's products: %s", flaw)


def _use_triton(subject: Subject) -> None:
    """Our kernels for GPUs: attention where the canary agrees with it, norm and head in one where they are the same."""
    try:
        from rewardserve_kernels.attention import triton as attention
        from rewardserve_kernels.kv_cache import triton as kv_cache
        from rewardserve_kernels.pooling import triton as pooling
    except ImportError as failure:
        log.warning("attention by the library's products: %s", failure)
        return
    backbone = subject.model.backbone
    backbone.attention = attention
    if flaw := subject.flaw():
        backbone.attention = chunked
        log.warning("attention by the library's products: %s", flaw)
    backbone.store_rows = kv_cache.store_rows
    if flaw := subject.flaw():
        backbone.store_rows = paged.store_rows
        log.warning("keys and values stored by the library's copies: %s", flaw)
    if subject.model.takes_mean:
        if reason := subject.model.use_sum_pieces(pooling.sum_pieces):
            log.warning("means row by row: %s", reason)
    elif reason := subject.model.use_pool_head(pooling.pool_head):
        log.warning("final norm and head one after the other: %s", reason)


def _compile(subject: Subject) -> str | None:
    """Compiles the decoder layers; why that failed, or None."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # one graph: a pool of compiler processes would only stay behind
    may_differ_by = 0.0
    if mixture.is_mixture(subject.model.backbone.module):  # its routing cannot be fixed in what is compiled
        may_differ_by = min(2 * subject.canary.run(subject.model)[1], MOST_BY_ROUNDINGS)
    started = time.perf_counter()
    subject.model.backbone.set_compiled(True)
    if flaw := subject.flaw(compiled_to=may_differ_by):
        return f"compiling failed: {flaw}"
    log.info("layers compiled in %.1f s", time.perf_counter() - started)
    return None


def _compare_speed(subject: Subject, what: str, switch: Callable[[bool], None]) -> str | None:
    """Runs a probe with the switch on and off, in turn, and leaves it on; why `what` does not pay, or None."""
    pack, pool = _probe(subject), KVPool(1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(PROBE_ROUNDS + 1):
        for on in (True, False):
            switch(on)
            started = _clock()
            subject.model.states_packed(pack, pool)
            elapsed = _clock() - started
            if number:  # the first one warms up
                seconds[on].append(elapsed)
    switch(True)
    ratio = min(seconds[False]) / min(seconds[True])  # what others take of the machine only ever adds
    log.info("%s: %.2f x as fast on a probe of %d tokens", what, ratio, len(pack.input_ids))
    return None if ratio > MIN_GAIN else f"{what}: {ratio:.2f} x as fast"


def _probe(subject: Subject) -> Pack:
    """Sequences of two blocks, without a prompt, of pseudo-random ids."""
    length = 2 * BLOCK_TOKENS
    num_rows = min(int(PROBE_FLOP / (2 * subject.num_parameters)), subject.max_batch_tokens)
    count = max(1, num_rows // length)
    ids = np.random.default_rng(0).integers(0, subject.model.backbone.config.vocab_size, count * length, np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), count)
    segments = tuple(Segment(i * length, length, 0, (), store=False) for i in range(count))
    last = torch.arange(1, count + 1, dtype=torch.int32) * length - 1
    return Pack(torch.from_numpy(ids), torch.from_numpy(positions), segments, segments, last)
