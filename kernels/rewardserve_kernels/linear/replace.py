"""Puts other modules in the place of a model's linear layers."""

from collections.abc import Callable

from torch import nn

Replaced = list[tuple[nn.Module, str, nn.Module]]  # (parent, name, what was there) of each


def replace_modules(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> Replaced:
    """Replaces every module below `module` for which `make` gives another; returns what was replaced.

    Who drops the result frees the weights.
    """
    replaced: Replaced = []
    for name, child in list(module.named_children()):
        if (new := make(child)) is None:
            replaced += replace_modules(child, make)
        else:
            setattr(module, name, new)
            replaced.append((module, name, child))
    return replaced


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module | None]) -> Replaced:
    """The same for linear layers. Exactly nn.Linear: what a subclass does besides is not known here."""
    return replace_modules(module, lambda child: make(child) if type(child) is nn.Linear else None)


def put_back(replaced: Replaced) -> None:
    for parent, name, module in replaced:
        setattr(parent, name, module)
