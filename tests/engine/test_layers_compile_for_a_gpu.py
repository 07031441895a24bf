"""What torch.compile makes of decoder layers for a GPU, where there is none (tests/support/pretend_compiler.py)."""

import json
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from forks import Forks

pytest.importorskip("triton", reason="triton is not installed")

IMPORTS = """
import json, sys
import checkpoints, pretend_compiler, torch
from rewardserve.engine.native import gpu
from rewardserve.models.backbone import Backbone
from rewardserve_kernels.linear.fp8 import Fp8Linear
"""
COMPILE = """
import json, sys
import checkpoints, pretend_compiler, torch
from rewardserve.engine.native import gpu
from rewardserve.models.backbone import Backbone
from rewardserve_kernels.linear.fp8 import Fp8Linear
from rewardserve_kernels.linear.replace import replace_linears
from torch._subclasses import FakeTensorMode

pretend_compiler.pretend()
families, is_invariant, is_fp8 = json.loads(sys.argv[1])
for family in families:
    model = checkpoints.make_model(family, torch.bfloat16, num_hidden_layers=2)
    backbone = Backbone(getattr(model, model.base_model_prefix))
    for layer in backbone.decoder_layers if is_fp8 else ():
        replace_linears(layer, Fp8Linear)
    backbone.prepare_packed(False, 1024)
    backbone.compile_options = gpu.compile_options() if is_invariant else {}
    backbone.set_compiled(True)
    pretend_compiler.kernels.clear(), pretend_compiler.graphs.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        pretend_compiler.put_there(backbone.module)
        for rows in (300, 512, 16, 9000):
            ids = torch.zeros(1, rows, dtype=torch.int32, device="cuda")
            backbone.module(input_ids=ids, position_ids=ids, use_cache=False)
    graphs = list(map(pretend_compiler.launches, pretend_compiler.graphs))
    sums = list(filter(pretend_compiler.sums, pretend_compiler.kernels))
    print(json.dumps({"graphs": graphs, "sums": sums}))
"""

Compiled = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Of each family, in one process: what its graphs launch, and the kernels that sum, once for each configuration;
    not those that are another family's already."""
    places = {name: str(tmp_path_factory.mktemp(name)) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    with Forks(IMPORTS, places) as forks:

        def run(*families: str, is_invariant: bool = True, is_fp8: bool = False) -> list[dict]:
            said = forks.run(COMPILE, json.dumps([families, is_invariant, is_fp8]))
            return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

        yield run


def ours(launches: list[str]) -> int:
    """How many of them Triton compiled."""
    return sum(name.startswith("triton_") for name in launches)


MOST_KERNELS = {"gpt_neox": 5, "qwen3_moe": 11, "qwen3": 6}  # Triton's, of a layer


@pytest.fixture(scope="module")
def layers(compiled: Compiled) -> dict[str, dict]:
    return dict(zip(MOST_KERNELS, compiled(*MOST_KERNELS), strict=True))


@pytest.mark.parametrize("family", MOST_KERNELS)
def test_one_graph_serves_all_layers_and_any_number_of_rows(layers: dict[str, dict], family: str) -> None:
    """What lies between products is one kernel each time."""
    (launches,) = layers[family]["graphs"]
    assert launches.count("attend") == 1 and 1 < ours(launches) <= MOST_KERNELS[family], launches


def test_sums_have_one_order_whatever_the_clock_says(compiled: Compiled, layers: dict[str, dict]) -> None:
    """Of one version in two processes a pair must have the same bits. A trace of torch.compile puts back what it takes
    for torch's own setting, so that everything compiled after the first one had its sums tried by the clock.
    """
    sums = Counter(name for found in layers.values() for name in found["sums"])
    assert len(sums) > 4 and set(sums.values()) == {1}, sums
    (free,) = compiled("qwen3", is_invariant=False)
    assert max(Counter(free["sums"]).values()) > 1, "or the lines above say nothing"


def test_layers_of_two_windows_take_two_graphs_and_8_bits_no_pass_of_their_own(compiled: Compiled) -> None:
    """In 8 bits rounding is part of what computes the rows anyway, once for all products of the same rows."""
    (found,) = compiled("gemma2", is_fp8=True)
    assert len(found["graphs"]) == 2
    for launches in found["graphs"]:
        assert launches.count("_scaled_mm") == 7 and 1 < ours(launches) <= 7, launches
