"""Is a packed forward right? Scored once by plain padded Hugging Face, then by every way of running that is tried."""

import math
from collections.abc import Sequence

import torch
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment, ceil_block

from rewardserve.engine.native.mixture import fixed_routing, is_mixture
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.packed_attention import Pack
from rewardserve.models.reward_model import RewardModel
from rewardserve.models.spec import ModelSpec

LONGEST = 1500  # tokens; a window longer than that is not crossed by the canary
MOST_BY_ROUNDINGS = 0.5  # of a mixture that chooses freely; seen: 0.29, and 0.7 to 1.3 where it chooses wrong experts


class Canary:
    """A prompt with responses, and the final hidden states that the padded forward gives them."""

    def __init__(self, model: RewardModel, spec: ModelSpec) -> None:
        """`model` must be on its padded path."""
        self._prompt, self._responses = _tokens(spec)
        rows = [self._prompt + response for response in self._responses]
        self._wanted = _padded_reference(model, rows)
        self._wanted_fixed: torch.Tensor | None = None
        module = model.backbone.module
        if module.dtype != torch.float32 and is_mixture(module):
            with fixed_routing(module):
                self._wanted_fixed = _padded_reference(model, rows)

    def run(self, model: RewardModel) -> tuple[KVPool, float]:
        """Relative difference to the padded states, the larger of the cold prompt's and of the prompt read from blocks.

        The median over the responses: a mistake of ours shows in all of them, while in low precision a mixture of
        experts may send a single token elsewhere for a difference of one rounding.
        """
        return self._run(model, self._wanted)

    def differs_by(self, model: RewardModel, tolerance: float) -> float:
        """The same difference; where it is above the tolerance, of a mixture in low precision, that of fixed routings.

        Roundings took 32 random layers with 4 of 32 experts 0.26 away, and 0.02 with the routing fixed. That does not
        see which experts are chosen: what is farther away than roundings take it is wrong. Compiled layers,
        which would keep the routing, run uncompiled meanwhile.
        """
        _, error = self.run(model)
        if tolerance < error <= MOST_BY_ROUNDINGS and self._wanted_fixed is not None:
            with model.backbone.uncompiled(), fixed_routing(model.backbone.module):
                _, error = self._run(model, self._wanted_fixed)
        return error

    def _run(self, model: RewardModel, wanted: torch.Tensor) -> tuple[KVPool, float]:
        num_blocks = ceil_block(len(self._prompt)) // BLOCK_TOKENS
        pool, blocks = KVPool(num_blocks), tuple(range(num_blocks))
        packs = [self._pack(model.backbone.device, blocks, with_prompt) for with_prompt in (True, False)]
        states = [model.states_packed(pack, pool) for pack in packs]
        errors = [((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item() for got in states]
        return pool, max(float("inf") if math.isnan(error) else error for error in errors)

    def _pack(self, device: torch.device, blocks: tuple[int, ...], with_prompt: bool) -> Pack:
        prompt = self._prompt
        ids = list(prompt) if with_prompt else []
        positions = list(range(len(ids)))
        segments = [Segment(0, len(prompt), 0, blocks, store=True)] if with_prompt else []
        for response in self._responses:
            segments.append(Segment(len(ids), len(response), len(prompt), blocks, store=False))
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
        reads = tuple(segment for segment in segments if not segment.store)
        rows = [read.row + read.num_rows - 1 for read in reads]
        ids_, positions_, rows_ = (
            torch.tensor(values, dtype=torch.int32, device=device) for values in (ids, positions, rows)
        )
        stored = None
        if device.type != "cpu":  # as in a pack of the engine's
            stored = StoreIndex(*(torch.from_numpy(part).to(device) for part in store_index(segments)))
        return Pack(ids_, positions_, tuple(segments), reads, rows_, stored)


def _padded_reference(model: RewardModel, rows: Sequence[list[int]]) -> torch.Tensor:
    """Final hidden states by plain padded Hugging Face, in its eager attention: the one that knows every option."""
    module = model.backbone.module
    implementation = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        hidden = model.backbone.run_padded([torch.tensor(row) for row in rows], [[len(row) - 1] for row in rows])
    module.set_attn_implementation(implementation)
    return hidden


def _tokens(spec: ModelSpec) -> tuple[list[int], list[list[int]]]:
    """A prompt and responses of pseudo-random ids: past a block's border, and past the attention window if in reach."""
    config = spec.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = BLOCK_TOKENS + 9
    if window and window + length < LONGEST:
        length += window
    length = min(length, spec.max_length - 30)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (max(1, count),), generator=generator).tolist()

    return tokens(length), [tokens(count) for count in (21, 2, 1, 9, 5, 14, 30)]
