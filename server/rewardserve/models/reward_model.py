"""Backbone + last-token pooling + scalar head; hidden states to scores in fp32 throughout."""

from collections.abc import Callable, Sequence

import torch
from rewardserve_kernels.pooling.reference import Norm, linear_head, normed

from rewardserve.models.backbone import Backbone, Pack
from rewardserve.models.kv_pool import KVPool

# hidden [rows, hidden_size], spans [spans, 2], weight, bias, norm -> scores [spans, heads]
PoolHead = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Norm | None], torch.Tensor]


class RewardModel:
    """Two ways to the same number: packs, and the padded Hugging Face forward they are checked against."""

    def __init__(self, backbone: Backbone, head_weight: torch.Tensor, head_bias: torch.Tensor | None) -> None:
        self.backbone = backbone
        self._head_weight = head_weight  # [1, hidden_size] fp32
        self._head_bias = head_bias  # [1] fp32
        self._pool_head: PoolHead | None = None
        self._norm: Norm | None = None

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.backbone.module.parameters()) + self._head_weight.numel()

    @torch.inference_mode()
    def score_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Scores of the pack's pooled segments, [len(pack.pooled)] fp32."""
        return self._head(self.backbone.run_packed(pack, pool))

    @torch.inference_mode()
    def states_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Final hidden states of the pack's pooled segments, after the final norm, [len(pack.pooled), hidden_size]."""
        hidden = self.backbone.run_packed(pack, pool)
        return hidden if self._norm is None else normed(hidden.float(), self._norm)

    @torch.inference_mode()
    def score_padded(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores of whole sequences (int64 token ids each), [len(rows)] fp32."""
        return self._head(self.backbone.run_padded(rows))

    @torch.inference_mode()
    def use_pool_head(self, pool_head: PoolHead) -> str | None:
        """Final norm and head in one launch from here on: `pool_head` of rewardserve_kernels.pooling.

        It is tried on a few rows first; if it fails or gives something else, all stays as it was, and the reason is
        returned.
        """
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(5, self._head_weight.shape[1], generator=generator).to(self._head_weight.device)
        norm = self.backbone.leave_out_final_norm()
        wanted = linear_head(rows if norm is None else normed(rows, norm), self._head_weight, self._head_bias)[:, 0]
        self._pool_head, self._norm = pool_head, norm
        try:
            got = self._head(rows)
            reason = None if torch.allclose(got, wanted, rtol=1e-4, atol=1e-5) else "it gives other scores"
        except Exception as error:  # rows too wide for it, a compiler that fails
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is not None:
            self._pool_head = self._norm = None
            self.backbone.restore_final_norm()
        return reason

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._pool_head is None:
            return linear_head(hidden, self._head_weight, self._head_bias)[:, 0]
        first = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
        spans = torch.stack([first, first + 1], 1)  # every row was picked already
        return self._pool_head(hidden, spans, self._head_weight, self._head_bias, self._norm)[:, 0]
