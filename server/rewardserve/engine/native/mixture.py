"""A mixture's routers and experts, told by the names that transformers gives them."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

ROUTER, EXPERTS = "Router", "Experts"


def is_mixture(module: nn.Module) -> bool:
    return any(type(part).__name__.endswith(EXPERTS) for part in module.modules())


def in_bf16(module: nn.Module) -> nn.Module | None:
    """A router in bf16, or such experts that are not built, as they are but for what they get in fp32; else None.

    A router in fp32 is one that casts what it gets.
    """
    own = list(module.parameters(recurse=False))
    if not own or not type(module).__name__.endswith((ROUTER, EXPERTS)):
        return None
    if any(parameter.dtype != torch.bfloat16 for parameter in own):
        return None
    same = copy.copy(module)  # of the same parameters, under the same names
    same._forward_pre_hooks = OrderedDict()
    same.register_forward_pre_hook(_inputs_in_bf16)
    return same


def _inputs_in_bf16(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return inputs[0].to(torch.bfloat16), *inputs[1:]


@contextmanager
def fixed_routing(module: nn.Module) -> Iterator[None]:
    """Every token goes to the same experts of a layer, with the weights of its own ones.

    A choice between two experts hangs on one rounding where they are nearly as good; the weights, sorted, do not. Not
    for compiled layers, which would keep the choice. Of experts that are not given tokens' choices and weights
    [tokens, chosen] it changes nothing.
    """
    with ExitStack() as hooks:
        experts = [part for part in module.modules() if type(part).__name__.endswith(EXPERTS)]
        for number, part in enumerate(experts):
            num_experts = getattr(part, "num_experts", None)
            if isinstance(num_experts, int):
                hooks.enter_context(_sent_to(part, number, num_experts))
        yield


@contextmanager
def _sent_to(experts: nn.Module, first: int, num_experts: int) -> Iterator[None]:
    def fix(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if len(inputs) != 3 or inputs[1].is_floating_point() or inputs[1].shape != inputs[2].shape:
            return None
        x, index, weights = inputs
        chosen = (torch.arange(index.shape[-1], device=index.device, dtype=index.dtype) + first) % num_experts
        return x, chosen.expand_as(index), weights.sort(dim=-1, descending=True).values

    handle = experts.register_forward_pre_hook(fix)
    try:
        yield
    finally:
        handle.remove()
