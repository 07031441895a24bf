"""Backbone + last-token pooling + scalar head; hidden states to scores in fp32 throughout."""

from collections.abc import Sequence

import torch
from rewardserve_kernels.pooling.reference import linear_head

from rewardserve.models.backbone import Backbone, KVPool, Pack


class RewardModel:
    """Two ways to the same number: packs, and the padded Hugging Face forward they are checked against."""

    def __init__(self, backbone: Backbone, head_weight: torch.Tensor, head_bias: torch.Tensor | None) -> None:
        self.backbone = backbone
        self._head_weight = head_weight  # [1, hidden_size] fp32
        self._head_bias = head_bias  # [1] fp32

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.backbone.module.parameters()) + self._head_weight.numel()

    @torch.inference_mode()
    def score_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Scores of the pack's pooled segments, [len(pack.pooled)] fp32."""
        return self._head(self.backbone.run_packed(pack, pool))

    @torch.inference_mode()
    def score_padded(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores of whole sequences (int64 token ids each), [len(rows)] fp32."""
        return self._head(self.backbone.run_padded(rows))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear_head(hidden, self._head_weight, self._head_bias)[:, 0]
