"""Puts other modules in the place of a model's linear layers."""

from collections.abc import Callable

from torch import nn

Replaced = list[tuple[nn.Module, str, nn.Linear]]  # (parent, name, what was there) of each


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> Replaced:
    """Replaces every linear layer below `module` for which `make` gives another; returns what was replaced.

    Exactly nn.Linear: what a subclass does besides is not known here. Who drops the result frees the weights.
    """
    replaced: Replaced = []
    for name, child in list(module.named_children()):
        if type(child) is not nn.Linear:
            replaced += replace_linears(child, make)
        elif (new := make(child)) is not None:
            setattr(module, name, new)
            replaced.append((module, name, child))
    return replaced


def put_back(replaced: Replaced) -> None:
    for parent, name, linear in replaced:
        setattr(parent, name, linear)
