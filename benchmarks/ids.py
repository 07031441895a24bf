"""Workloads as token ids: the same for every provider, and new to every cache in each round."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peers.protocol import Groups, rows_of
from rewardserve.client import ChatMessage, Group, TokenIds
from rewardserve.loadtest import workloads
from rewardserve.loadtest.workloads import Traffic, Workload
from tokenizers import Tokenizer

END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Work:
    """One workload; `salted` gives it again with beginnings that no cache has seen."""

    workload: Workload
    tokenizer: Tokenizer
    max_length: int

    @property
    def num_pairs(self) -> int:
        return self.workload.num_pairs

    def salted(self, salt: int) -> Groups:
        """All groups under one salt: what they have in common they keep in common."""
        groups = [self._encode(workloads.cold(group, salt)) for group in self.workload.groups]
        longest = max(map(len, rows_of(groups)))
        if longest > self.max_length:
            raise ValueError(f"{self.workload.name}: {longest} tokens are more than the {self.max_length} loaded for")
        return groups

    def _encode(self, group: Group) -> tuple[list[int], list[list[int]]]:
        match group.prompt:
            case TokenIds():
                return _ids(group.prompt), [_ids(response) for response in group.responses]
            case str(text):
                messages: Sequence[ChatMessage] = [ChatMessage("user", text)]
            case messages:
                pass
        turns = "".join(f"<|im_start|>{message.role}\n{message.content}{END}\n" for message in messages)
        texts = [turns + "<|im_start|>assistant\n", *(response + END for response in group.responses)]
        prompt, *responses = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        return prompt, responses


def make(name: str, traffic: Traffic, model: Path, max_responses: int, max_length: int) -> Work:
    """With at most `max_responses` of each group, if it is not 0."""
    workload = workloads.make(name, traffic)
    if name == "grpo_64" and traffic.scale > 1:
        workload = replace(workload, description=f"{workload.description}, all divided by {traffic.scale}")
    if max_responses:
        groups = (replace(group, responses=group.responses[:max_responses]) for group in workload.groups)
        description = f"{workload.description}; at most {max_responses} responses each"
        workload = replace(workload, groups=tuple(groups), description=description)
    return Work(workload, Tokenizer.from_file(str(model / "tokenizer.json")), max_length)


def write(groups: Groups, file: Path) -> Path:
    file.write_text(json.dumps(groups, separators=(",", ":")))
    return file


def _ids(ids: object) -> list[int]:
    assert isinstance(ids, TokenIds)
    return list(array("i", ids.data))
