"""Backbone, where it is read, and head; hidden states to features in fp32 throughout."""

from collections.abc import Callable, Sequence

import torch
from rewardserve_kernels.pooling.reference import Norm, normed
from rewardserve_kernels.pooling.running_mean import MeanRows, SumPieces, plan_means, running_means, sum_pieces
from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
from rewardserve_kernels.upload import Upload

from rewardserve.models.backbone import Backbone
from rewardserve.models.heads import Head, LinearHead
from rewardserve.models.kv_pool import KVPool
from rewardserve.models.packed_attention import Pack

# hidden [rows, hidden_size], spans [spans, 2], weight, bias, norm -> scores [spans, heads]
DIFFERENT_SCORES = "it gives other scores"
PoolHead = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Norm | None], torch.Tensor]


class RewardModel:
    """Two ways to the same numbers: packs, and the padded Hugging Face forward they are checked against."""

    def __init__(
        self, backbone: Backbone, heads: Sequence[Head], takes_mean: bool = False, adapter: torch.Tensor | None = None
    ) -> None:
        """With `takes_mean` a head reads the mean over all tokens instead of single ones.

        Several `heads` are of several models with this backbone, or what adapters make of it: `adapter`, [1], says
        which one (rewardserve_kernels.linear.adapted). The first one is in use at first.
        """
        self.backbone = backbone
        self.heads = tuple(heads)
        self.head = heads[0]
        self.takes_mean = takes_mean
        self._adapter = adapter
        self._sum_pieces: SumPieces = sum_pieces
        self._pool_head: PoolHead | None = None
        self._norm: Norm | None = None
        self._single_rows: torch.Tensor | None = None  # [[0, 1], [1, 2], ...]

    @property
    def num_parameters(self) -> int:
        """Of all models with this backbone."""
        own = sum(p.numel() for p in self.backbone.module.parameters())
        return own + sum(head.num_parameters for head in self.heads)

    def use(self, variant: int) -> None:
        """What is computed from here on is of the model with this head, and with the adapter of the same number."""
        self.head = self.heads[variant]
        if self._adapter is not None:
            self._adapter.fill_(variant)

    @torch.inference_mode()
    def features_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Features of the pack's reads, [pack.num_reads, features] fp32."""
        return self.features_of(self.hidden_packed(pack, pool), pack.means, pool)

    @torch.inference_mode()
    def hidden_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """What features are made of: hidden states [reads, hidden_size] or, for a mean, [rows, hidden_size]."""
        return self.backbone.run_all_rows(pack, pool) if self.takes_mean else self.backbone.run_packed(pack, pool)

    @torch.inference_mode()
    def features_of(self, hidden: torch.Tensor, means: MeanRows | None, pool: KVPool) -> torch.Tensor:
        """The second half of `features_packed`: the part that is not the same for every model with this backbone."""
        if self.takes_mean:
            assert means is not None and pool.sums is not None
            hidden = running_means(hidden, means, pool.sums, self._sum_pieces)
        return self._features(hidden)

    @torch.inference_mode()
    def states_packed(self, pack: Pack, pool: KVPool) -> torch.Tensor:
        """Final hidden states of the pack's reads, after the final norm, [pack.num_reads, hidden_size]."""
        hidden = self.backbone.run_packed(pack, pool)
        return hidden if self._norm is None else normed(hidden.float(), self._norm)

    @torch.inference_mode()
    def features_padded(self, rows: Sequence[torch.Tensor], reads: Sequence[Sequence[int]]) -> torch.Tensor:
        """Of whole sequences (int64 token ids each), read at `reads` of each: [all reads, features] fp32."""
        if self.takes_mean:
            return self._features(self.backbone.means_padded(rows))
        return self._features(self.backbone.run_padded(rows, reads))

    @torch.inference_mode()
    def use_pool_head(self, pool_head: PoolHead) -> str | None:
        """Final norm and head in one launch from here on: `pool_head` of rewardserve_kernels.pooling.

        It is tried on a few rows first; if it fails or gives something else, all stays as it was, and the reason is
        returned.
        """
        if not all(isinstance(head, LinearHead) for head in self.heads) or self.takes_mean:
            return "it is for a linear head that reads single tokens"
        assert isinstance(self.head, LinearHead)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(5, self.head.weight.shape[1], generator=generator).to(self.head.weight.device)
        used, norm = self.head, self.backbone.leave_out_final_norm()
        if norm is not None:  # it takes what comes out of the last layer, and what is not tried now is compiled later
            rows = rows.to(self.backbone.hidden_dtype)
        self._pool_head, self._norm = pool_head, norm
        reason = next((flaw for head in self.heads if (flaw := self._flaw_of_pooling(head, rows))), None)
        self.head = used
        if reason is not None:
            self._pool_head = self._norm = None
            self.backbone.restore_final_norm()
        return reason

    def _flaw_of_pooling(self, head: Head, rows: torch.Tensor) -> str | None:
        """What `_pool_head` does wrong with this head, or None."""
        wanted = head(rows if self._norm is None else normed(rows.float(), self._norm))
        self.head = head
        try:
            return None if torch.allclose(self._features(rows), wanted, rtol=1e-4, atol=1e-5) else DIFFERENT_SCORES
        except Exception as error:  # rows too wide for it, a compiler that fails
            return f"{type(error).__name__}: {error}".splitlines()[0]

    @torch.inference_mode()
    def use_sum_pieces(self, summed: SumPieces) -> str | None:
        """Means are of what this sums up, from here on: rewardserve_kernels.pooling. It is tried first, likewise."""
        device, size = self.backbone.device, self.backbone.config.hidden_size
        begun, own = Segment(0, 70, 0, (1, 2), store=True), Segment(70, 90, BLOCK_TOKENS - 40, (0, 3), store=True)
        upload = Upload()
        means = plan_means((begun, own), (0, 1), upload)
        upload.ship(device)
        plan = means()
        generator = torch.Generator().manual_seed(0)
        rows, sums = (torch.randn(count, size, generator=generator).to(device) for count in (160, 4))
        try:
            for pieces in (plan.stored, plan.own):
                if not torch.equal(summed(rows, pieces, sums), sum_pieces(rows, pieces, sums)):
                    return "it gives other sums"
        except Exception as error:  # a compiler that fails
            return f"{type(error).__name__}: {error}".splitlines()[0]
        self._sum_pieces = summed
        return None

    def _features(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._pool_head is None:
            return self.head(hidden)
        assert isinstance(self.head, LinearHead)
        if self._single_rows is None or len(hidden) > len(self._single_rows):
            first = torch.arange(2 * len(hidden), dtype=torch.int32, device=hidden.device)
            self._single_rows = torch.stack([first, first + 1], 1)
        spans = self._single_rows[: len(hidden)]  # every row was picked already
        return self._pool_head(hidden, spans, self.head.weight, self.head.bias, self._norm)
