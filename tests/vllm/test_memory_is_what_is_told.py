"""What is held for prompts is what --prefix-cache-mb says, and what it cannot hold is not promised."""

import types

import checkpoints
import pytest
import torch
from rewardserve.engine.vllm_load import memory_of
from rewardserve.engine.vllm_options import VllmOptions

OUT_OF_RANGE = 11
GIB = 1 << 30


def test_where_the_cache_is_small_inputs_are_to_be_shorter_and_forwards_take_them_in_parts(start, kit, checkpoint):
    small = ("--prefix-cache-mb", "1", "--max-batch-tokens", "100")
    server = start("--model", f"m={checkpoint}", "--engine", "vllm", *small).ready()
    model = server.model()
    assert 16 <= model.max_length <= model.prefix_cache_tokens < 2048
    assert any(f"max_length is {model.max_length}, not 2048" in line for line in server.log)
    responses = [kit.random_ids(length, length) for length in (model.max_length - 1, model.max_length, 150)]
    items = server.scoring.Score(kit.ids_request([5], responses), timeout=kit.ANTI_HANG_S).groups[0].items
    assert [item.status.code for item in items] == [0, OUT_OF_RANGE, 0]
    wanted = checkpoints.padded_scores(checkpoint, [[5, *responses[0]], [5, *responses[2]]], torch.float32)
    assert [items[0].score, items[2].score] == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-4)


def test_a_cache_that_memory_does_not_hold_is_refused_by_the_name_of_its_option(start, checkpoint):
    server = start("--model", f"m={checkpoint}", "--engine", "vllm", "--prefix-cache-mb", str(1 << 30))
    assert server.wait() == 1
    assert "vLLM cannot serve it" in server.log[-1] and "--prefix-cache-mb" in server.log[-1]


def test_a_new_version_may_be_loaded_beside_the_old_one_on_a_gpu():
    """vLLM refuses to start where less of a GPU is free than it may use: most of it, unless it is told."""
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    two_thirds_taken = types.SimpleNamespace(total_memory=80 * GIB, free_memory=26 * GIB, device_="cuda:0")
    told = memory_of(VllmOptions("x", prefix_cache_bytes=8 * GIB, tensor_parallel=2), on_cpu=False)
    assert told["kv_cache_memory_bytes"] == 4 * GIB
    assert request_memory(two_thirds_taken, CacheConfig(**told)) < 26 * GIB
    with pytest.raises(ValueError, match="memory utilization"):
        request_memory(two_thirds_taken, CacheConfig(**memory_of(VllmOptions("x"), on_cpu=False)))
