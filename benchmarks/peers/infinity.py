"""infinity, which serves a classifier of one label as a reranker: query and document in, raw score out.

It takes text only. To score the same ids as everyone it is given a copy of the checkpoint whose tokenizer knows one
word for each id, the number itself, so that its tokenization costs next to nothing.

In bf16 it casts the rotary frequencies too, which nobody else does: its scores are off by more the longer the input is
(0.04 at 768 tokens, where padded Hugging Face is off by 0.005; the same model with them in fp32 is as right as that).
"""

import asyncio
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from infinity_emb import AsyncEmbeddingEngine, EngineArgs

from peers.protocol import Groups, Job, OneProcess, Scores, serve

BATCH_SIZE = 8  # as Hugging Face's; its own default of 32 only pads more on a CPU
PAD = "<pad>"  # a special token is found inside of words too: it must be part of no number

Texts = list[tuple[str, list[str]]]


class Infinity(OneProcess):
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory()
        self._engine: AsyncEmbeddingEngine | None = None

    def load(self, job: Job) -> dict[str, str]:
        folder = Path(self._folder.name)
        _copy_with_numbers(Path(job.model), folder, job.max_length)
        arguments = EngineArgs(
            model_name_or_path=str(folder),
            device=job.device,
            dtype=job.dtype,
            engine="torch",
            batch_size=BATCH_SIZE,
            model_warmup=False,  # the benchmark's own check warms everyone up
        )
        engine = AsyncEmbeddingEngine.from_args(arguments)
        self._loop.run_until_complete(engine.astart())
        self._engine = engine
        names = ("infinity_emb", "torch", "transformers", "sentence-transformers")
        return {name: version(name) for name in names}

    def prepare(self, groups: Groups) -> Texts:
        return [(_text(prompt), list(map(_text, responses))) for prompt, responses in groups]

    def score(self, prepared: Texts) -> Scores:
        return self._loop.run_until_complete(self._all(prepared))

    async def _all(self, texts: Texts) -> Scores:
        return await asyncio.gather(*(self._group(prompt, responses) for prompt, responses in texts))

    async def _group(self, prompt: str, responses: list[str]) -> list[float]:
        """What comes back is sorted by score."""
        assert self._engine is not None
        ranked, _ = await self._engine.rerank(query=prompt, docs=responses, raw_scores=True)
        scores = {result.index: float(result.relevance_score) for result in ranked}
        return [scores[index] for index in range(len(responses))]

    def close(self) -> None:
        if self._engine:
            self._loop.run_until_complete(self._engine.astop())
        self._folder.cleanup()


def _text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _copy_with_numbers(model: Path, folder: Path, max_length: int) -> None:
    for file in (model / "config.json", *model.glob("*.safetensors*")):
        os.symlink(file.resolve(), folder / file.name)
    config = json.loads((model / "config.json").read_text())
    vocabulary = {str(number): number for number in range(config["vocab_size"])}
    vocabulary[PAD] = vocabulary.pop(str(config["pad_token_id"]))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": PAD},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    serve(Infinity())
