"""The kernels of a part's device: Triton's, or what a dry run has instead."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from part import Part
from rewardserve_kernels.attention import chunked
from rewardserve_kernels.kv_cache.paged import StoreIndex, store_index, store_rows
from rewardserve_kernels.pooling import reference, running_mean
from rewardserve_kernels.ragged import Segment


def attention_kernel(part: Part) -> Any:
    if not part.on_gpu:
        return chunked
    from rewardserve_kernels.attention import triton

    return triton


def index_of(part: Part, segments: Sequence[Segment]) -> StoreIndex:
    return StoreIndex(*(torch.from_numpy(row).to(part.device) for row in store_index(segments)))


def store_kernel(part: Part) -> Callable[..., None]:
    if not part.on_gpu:
        return store_rows
    from rewardserve_kernels.kv_cache import triton

    return triton.store_rows


def pool_kernel(part: Part) -> Callable[..., torch.Tensor]:
    if not part.on_gpu:
        return reference.pool_head
    from rewardserve_kernels.pooling import triton

    return triton.pool_head


def sum_kernel(part: Part) -> running_mean.SumPieces:
    if not part.on_gpu:
        return running_mean.sum_pieces
    from rewardserve_kernels.pooling import triton

    return triton.sum_pieces
