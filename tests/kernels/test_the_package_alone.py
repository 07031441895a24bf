"""Somebody who wants the kernels and no server is told how, and it works."""

import textwrap
from pathlib import Path
from typing import Any

import rewardserve_kernels
import torch
from torch.nn.functional import scaled_dot_product_attention


def test_the_packages_own_example_attends_as_torch_does() -> None:
    text = rewardserve_kernels.__doc__ or ""
    found: dict[str, Any] = {}
    exec(textwrap.dedent(text[text.index("    import torch") :]), found)
    q, k, v, out = (found[name] for name in ("q", "k", "v", "out"))
    for answer in found["answers"]:
        rows = [*range(answer.start), *range(answer.row, answer.row + answer.num_rows)]
        whole = scaled_dot_product_attention(q[:, rows], k[:, rows], v[:, rows], is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[rows], whole.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_every_room_it_names_exists_and_no_other() -> None:
    text = rewardserve_kernels.__doc__ or ""
    folders = {path.parent.name for path in Path(rewardserve_kernels.__file__).parent.glob("*/__init__.py")}
    assert {
        line.split("/")[0].strip() for line in text.splitlines() if line.startswith("    ") and "/ " in line
    } == folders
