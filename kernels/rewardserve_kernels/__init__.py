"""What a batch of sequences that share beginnings is computed with. It knows nothing of the server and stands alone:
of the distribution it needs torch and numpy, its modules named `triton` Triton too, and those named `avx512` Linux, an
x86 CPU with bf16 dot products (`avx512_bf16`) and g++; each says so when it cannot be had.

    attention/  of a pack of segments, each to its stored beginning and itself: `chunked` for any device, `avx512`,
                `triton`, and `reference`, the oracle
    kv_cache/   keys and values in blocks that sequences share: `paged`, and `triton` in one launch
    linear/     linear layers that take a model's place: `avx512`, `prepacked`, `int8`, `fp8`, `adapted`
    pooling/    hidden states to scores: `reference`, `triton`, and means that go on where they were cut
    ragged      what a pack is: a `Segment` for each run of rows of one sequence

One prompt of 100 tokens and two answers to it, of 20 and 30, for one layer:

    import torch
    from rewardserve_kernels.attention import chunked
    from rewardserve_kernels.kv_cache.paged import store_segment
    from rewardserve_kernels.ragged import BLOCK_TOKENS, Segment
    from rewardserve_kernels.workspace import Workspace

    heads, kv_heads, size = 8, 2, 64
    prompt = Segment(row=0, num_rows=100, start=0, blocks=(0,), store=True)
    answers = [
        Segment(row=100, num_rows=20, start=100, blocks=(0,), store=False),
        Segment(row=120, num_rows=30, start=100, blocks=(0,), store=False),
    ]
    q, k, v = torch.randn(heads, 150, size), torch.randn(kv_heads, 150, size), torch.randn(kv_heads, 150, size)
    pool_k, pool_v = torch.zeros(2, 1, kv_heads, BLOCK_TOKENS, size)
    for pool, rows in ((pool_k, k), (pool_v, v)):
        store_segment(pool, rows[:, :100], prompt)
    plan = chunked.plan_attention([prompt, *answers], q.dtype, q.device)
    out = chunked.tree_attention(q, k, v, pool_k, pool_v, plan, Workspace(), scale=size**-0.5)  # [150, heads, size]
"""
