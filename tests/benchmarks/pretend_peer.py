"""A provider without a model: a score is a sum over the ids, plus what it is told to be off by. Speaks for all."""

import sys

from peers.protocol import Groups, Job, OneProcess, Scores, serve
from work import ModelShape


class PretendPeer(OneProcess):
    def __init__(self, error: float) -> None:
        self._error = error

    def load(self, job: Job) -> dict[str, str]:
        return {"pretended": "1"}

    def prepare(self, groups: Groups) -> Groups:
        return groups

    def score(self, prepared: Groups) -> Scores:
        return [[(sum(prompt) + sum(r)) % 97 / 30 + self._error for r in responses] for prompt, responses in prepared]

    def rates(self) -> dict[str, float]:
        return dict.fromkeys(ModelShape(1, 1, 1, 1, 1, 1).linears, 1e9)


if __name__ == "__main__":
    serve(PretendPeer(float(sys.argv[1])))
