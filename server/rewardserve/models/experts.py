"""A mixture's weights: experts saved one by one, held by transformers as stacks with the gate above its factor."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

Stack = tuple[tuple[str, ...], ...]  # of each expert, the keys whose rows follow one another

OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
PLACES = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
PARTS = {"gate_up_proj": 2, "down_proj": 1}
SAVED, HELD = ".block_sparse_moe.", ".mlp."  # in names of Mixtral's


def as_held(keys: Mapping[str, str], held: Iterable[str]) -> dict[str, str]:
    """`keys` of a checkpoint by names within the backbone, where mixtures are called as they are in those of `held`."""
    if any(SAVED in name for name in held):
        return dict(keys)
    return {name.replace(SAVED, HELD): key for name, key in keys.items()}


def stacks(keys: Mapping[str, str]) -> dict[str, Stack]:
    """`keys` of a checkpoint by names within the backbone -> the stacks that they make, by theirs; whole ones only."""
    found: defaultdict[tuple[str, str], dict[tuple[int, int], str]] = defaultdict(dict)
    for name, key in keys.items():
        if (match := OF_EXPERT.fullmatch(name)) and match[3] in PLACES:
            stack, place = PLACES[match[3]]
            found[match[1], stack][int(match[2]), place] = key
    whole = {}
    for (experts, stack), parts in found.items():
        count = PARTS[stack]
        order = [[(number, place) for place in range(count)] for number in range(len(parts) // count)]
        if parts.keys() == {each for places in order for each in places}:
            whole[f"{experts}.{stack}"] = tuple(tuple(parts[each] for each in places) for places in order)
    return whole
