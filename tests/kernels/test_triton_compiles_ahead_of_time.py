"""What the compiler makes of the Triton kernels for GPUs that are not here: the right instructions, and no spills.

Read off the machine code by the disassembler that comes with triton. It says nothing of speed.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
from rewardserve_kernels.attention import triton as attention
from rewardserve_kernels.kv_cache import triton as kv_cache
from rewardserve_kernels.pooling import triton as pooling
from rewardserve_kernels.pooling.reference import Norm, NormKind, Pooling
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.skipif(not isinstance(attention.attend_tile, triton.JITFunction), reason="triton interprets, here"),
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="this triton comes without NVIDIA's tools"),
]
KB = 1024
SHARED_BYTES = {80: 163 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}  # of a block: CUDA's guide
REGISTERS = 65_536  # of a multiprocessor, all of these
POINTERS = {"work": "*i32", "spans": "*i32", "counts_before": "*i32"}
POINTERS |= dict.fromkeys(
    ("q", "k", "v", "pool_k", "pool_v", "out", "sinks", "hidden", "norm_weight", "norm_bias"), "*"
)
POINTERS |= dict.fromkeys(("head_weight", "head_bias", "scores", "sums_before", "sums", "total"), "*fp32")
POINTERS |= {"rows": "*", "begins": "*i64", "counts": "*i64", "carried": "*i64", "blocks": "*i32", "slots": "*i32"}
STRIDES = ("q_head", "q_row", "k_head", "k_row", "v_head", "v_row", "row_stride")
FLOATS = ("unit", "softcap", "squash", "eps")


@dataclass(frozen=True)
class Compiled:
    shared: int  # bytes
    registers: int
    stack: int  # bytes
    code: str

    def count(self, instruction: str) -> int:
        """Instructions of this name, whatever their suffixes."""
        return len(re.findall(rf"\s{instruction}[\s.]", self.code))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what this run compiled."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def compiled(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))

    def run(
        kernel: Any,
        architecture: int,
        dtype: str,
        constants: dict[str, Any],
        options: dict[str, Any],
        pointers: dict[str, str] | None = None,
    ) -> Compiled:
        """As for tensors, but those of integers, and strides of whole 16 bytes. `pointers`: of this kernel alone."""
        kinds = POINTERS | (pointers or {}) | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
        kinds = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        signature = {name: kind + dtype if kind == "*" else kind for name, kind in kinds.items()}
        place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
        aligned = [
            name for name, kind in kinds.items() if (kind[0] == "*" and not kind.startswith("*i")) or name in STRIDES
        ]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={place[name]: value for name, value in constants.items()},
            attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
        )
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        usage, code = (_tool("cuobjdump", what, str(tmp_path / "kernel.cubin")) for what in ("-res-usage", "-sass"))
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return Compiled(made.metadata.shared, int(registers), int(stack), code)

    return run


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def attention_constants(
    sizes: tuple[int, int],
    heads: int,
    kv_heads: int,
    tuning: attention.Tuning,
    window=False,
    softcap=False,
    sinks=False,
) -> dict[str, Any]:
    fixed = attention.constants(heads, kv_heads, *sizes, tuning)
    return fixed | {"ALIGNED": True, "HAS_WINDOW": window, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks}


MODELS = {  # (head sizes, heads, kv heads, options)
    "Llama 3 1B": ((64, 64), 32, 8, {}),
    "Qwen3 8B": ((128, 128), 32, 8, {}),
    "Phi 2": ((80, 80), 32, 32, {}),
    "GPT-OSS": ((64, 64), 64, 8, {"window": True, "sinks": True}),
    "Gemma 2": ((256, 256), 16, 8, {"window": True, "softcap": True}),
    "Gemma 3": ((256, 256), 16, 8, {"window": True}),
    "DeepSeek": ((192, 128), 16, 16, {}),
}
EVERYWHERE = ("Llama 3 1B", "Qwen3 8B")
CASES = [(name, architecture) for architecture in (80, 90, 100) for name in EVERYWHERE]
CASES += [(name, 90) for name in MODELS if name not in EVERYWHERE]
CASES += [(name, architecture) for architecture in (89, 120) for name in ("Qwen3 8B", "Gemma 2")]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_attention_uses_the_matrix_units_loads_ahead_and_spills_nothing(name: str, architecture: int, compiled) -> None:
    sizes, heads, kv_heads, options = MODELS[name]
    tuning = attention.default_tuning(*sizes, torch.bfloat16, divmod(architecture, 10))
    constants = attention_constants(sizes, heads, kv_heads, tuning, **options)
    made = compiled(attention.attend_tile, architecture, "bf16", constants, attention.compiler_options(tuning))
    matrix = {90: "HGMMA", 100: "UTCHMMA"}.get(architecture, "HMMA")
    assert made.count(matrix) > 0
    assert made.count("LDGSTS") > 0, "keys and values are not copied to shared memory ahead of their use"
    if architecture != 100:  # whose waits are loops themselves
        under_way = [copies_under_way(loop) for loop in loops_of(made.code) if any(name == matrix for name, _ in loop)]
        assert len(under_way) == 2
        assert min(under_way) >= 2, "where a block is multiplied, the next one's keys and values are not on their way"
    if architecture == 90:
        assert made.count("HMMA") == 0, "some products are not by whole warp groups"
    assert_fits(made, architecture, tuning.num_warps)


def copies_under_way(loop: list[tuple[str, str]]) -> int:
    """Groups of copies, one of keys or of values each, that its first wait leaves alone."""
    waits = [re.search(r"SB0, 0x([0-9a-f]+)", arguments) for name, arguments in loop if name == "DEPBAR"]
    return next(int(wait[1], 16) for wait in waits if wait)


def assert_fits(made: Compiled, architecture: int, num_warps: int, blocks: int = 1) -> None:
    """`blocks`: how many a multiprocessor holds at once, so that one computes while others wait for memory."""
    assert (made.stack, made.count("STL"), made.count("LDL")) == (0, 0, 0), "registers are spilled"
    assert made.registers * 32 * num_warps * blocks <= REGISTERS
    assert made.shared * blocks <= SHARED_BYTES[architecture]


def test_two_tiles_fit_on_a_multiprocessor_if_their_registers_are_limited(compiled) -> None:
    """What bench-gpu tries beside the tunings there are. Triton 3.6 spills nothing of it, 3.9 a word or two."""
    tuning = attention.Tuning(128, 32, 8, 4, max_registers=128)
    constants = attention_constants((128, 128), 32, 8, tuning)
    made = compiled(attention.attend_tile, 90, "bf16", constants, attention.compiler_options(tuning))
    assert made.stack <= 16
    assert made.registers * 32 * tuning.num_warps * 2 <= REGISTERS
    assert made.shared * 2 <= SHARED_BYTES[90]


def test_attention_in_fp32_fits_too(compiled) -> None:
    tuning = attention.default_tuning(128, 128, torch.float32, (9, 0))
    constants = attention_constants((128, 128), 32, 8, tuning)
    made = compiled(attention.attend_tile, 90, "fp32", constants, attention.compiler_options(tuning))
    assert made.count("HGMMA") == 0, "products of fp32 are rounded to tf32"
    assert made.shared <= SHARED_BYTES[90]


ARITHMETIC = {"HGMMA", "FADD", "FMUL", "FFMA", "FMNMX", "MUFU", "F2FP"}


@pytest.mark.parametrize("options", [{}, {"window": True, "softcap": True, "sinks": True}], ids=["plain", "all"])
def test_both_loops_of_attention_do_the_same_arithmetic(options: dict[str, bool], compiled) -> None:
    """Which loop a key comes up in depends on where the sequence was cut. A row's bits must not."""
    tuning = attention.default_tuning(128, 128, torch.bfloat16, (9, 0))
    constants = attention_constants((128, 128), 32, 8, tuning, **options)
    made = compiled(attention.attend_tile, 90, "bf16", constants, attention.compiler_options(tuning))
    loops = [Counter(name for name, _ in loop if name in ARITHMETIC) for loop in loops_of(made.code)]
    loops = [loop for loop in loops if loop["HGMMA"]]
    assert len(loops) == 2
    assert loops[0] == loops[1]


def loops_of(code: str) -> list[list[tuple[str, str]]]:
    """The instructions, without suffixes, and their arguments, from where a branch goes back to."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*?);")
    lines = [(int(m[1], 16), m[2], m[3]) for m in line.finditer(code)]
    loops = []
    for address, instruction, arguments in lines:
        target = re.search(r"\s0x([0-9a-f]+)", arguments)
        if instruction == "BRA" and target and int(target[1], 16) < address:
            loops.append([(name, rest) for at, name, rest in lines if int(target[1], 16) <= at <= address])
    return loops


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    ("hidden_size", "norm"), [(4096, "rms"), (8192, "rms"), (4096, "layer")], ids=["4096", "8192", "4096 LayerNorm"]
)
def test_pooling_loads_rows_ahead_and_spills_nothing(hidden_size: int, norm: str, architecture: int, compiled) -> None:
    weight = torch.empty(0)
    norms = {"rms": Norm(NormKind.RMS, weight, 1e-6), "layer": Norm(NormKind.LAYER, weight, 1e-5, weight)}
    constants = pooling.constants(hidden_size, torch.bfloat16, norms[norm], Pooling.MEAN)
    constants |= {"HAS_HEAD_BIAS": True, "HAS_BEFORE": True, "KEEPS_SUMS": True, "heads": 1}  # 1 is compiled in
    options = pooling.compiler_options(hidden_size)
    made = compiled(pooling.pool_span, architecture, "bf16", constants, options)
    assert made.count("LDGSTS") > 0
    assert_fits(made, architecture, options["num_warps"], blocks=2 if hidden_size <= 4096 else 1)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("hidden_size", [1024, 2560, 4096, 8192])
def test_last_rows_are_read_by_wide_loads_and_spill_nothing(hidden_size: int, architecture: int, compiled) -> None:
    constants = pooling.constants(hidden_size, torch.bfloat16, Norm(NormKind.RMS, torch.empty(0), 1e-6), Pooling.LAST)
    assert constants["ROWS"] > 1, "the norm and the head are read once for every row"
    constants |= {"HAS_HEAD_BIAS": True, "heads": 1}
    options = pooling.compiler_options(hidden_size)
    made = compiled(pooling.score_last_rows, architecture, "bf16", constants, options)
    assert made.count("LDG.E.128") >= constants["ROWS"] and "LDG.E.U16" not in made.code
    assert_fits(made, architecture, options["num_warps"], blocks=2)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sums_of_rows_spill_nothing(dtype: str, architecture: int, compiled) -> None:
    constants = {"HIDDEN_SIZE": 4096, "BLOCK": pooling.SUM_COLUMNS}
    made = compiled(pooling.sum_rows, architecture, dtype, constants, pooling.SUM_OPTIONS)
    assert_fits(made, architecture, pooling.SUM_OPTIONS["num_warps"], blocks=16)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 80), (192, 128)], ids=str)
def test_rows_are_stored_by_wide_copies_and_spill_nothing(sizes: tuple[int, int], architecture: int, compiled) -> None:
    constants = kv_cache.constants(attention.BLOCK_TOKENS, *sizes)
    made = compiled(kv_cache.store_tile, architecture, "bf16", constants, kv_cache.OPTIONS, {"rows": "*i32"})
    for narrow in ("LDG.E.U16", "STG.E.U16"):
        assert narrow not in made.code, "a row is copied element by element"
    assert "STG.E.128" in made.code
    assert_fits(made, architecture, kv_cache.OPTIONS["num_warps"], blocks=5)
