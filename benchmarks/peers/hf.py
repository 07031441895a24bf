"""Hugging Face transformers: `padded` batches as they come, `sorted` by length, or `exact`, one by one."""

import sys
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModelForSequenceClassification

from peers.protocol import Groups, Job, OneProcess, Scores, grouped, rows_of, serve

BATCH_SIZE = 8


class HuggingFace(OneProcess):
    def __init__(self, way: str) -> None:
        self._sorted = way == "sorted"
        self._batch_size = 1 if way == "exact" else BATCH_SIZE

    def load(self, job: Job) -> dict[str, str]:
        torch.set_num_threads(job.threads)
        self._model = AutoModelForSequenceClassification.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
        self._model.to(job.device).eval()
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def prepare(self, groups: Groups) -> Groups:
        return groups

    def score(self, prepared: Groups) -> Scores:
        rows = rows_of(prepared)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i])) if self._sorted else list(range(len(rows)))
        scores = [0.0] * len(rows)
        for begin in range(0, len(rows), self._batch_size):
            batch = order[begin : begin + self._batch_size]
            for index, score in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                scores[index] = score
        return grouped(scores, prepared)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Right-padded; the score is that of the last true token."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        device = self._model.device
        hidden = self._model.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
        last = hidden[torch.arange(len(rows)), lengths - 1]
        return self._model.score(last)[:, 0].float().tolist()


if __name__ == "__main__":
    serve(HuggingFace(sys.argv[1]))
