"""A response's steps: where they end, and how the models that judge them are shown them."""

from collections.abc import Sequence
from itertools import pairwise

from rewardserve.errors import InvalidRequest
from rewardserve.types import Message, Response, StepFormat, StepIds, Steps, StepStyle, TokenIds

BY_END = StepFormat()  # for models that were not made for steps


def steps_of(response: str | Steps, separator: str) -> tuple[str, ...]:
    """Those the caller gave, or the pieces between separators that hold more than white space."""
    if isinstance(response, Steps):
        return response.texts
    return tuple(step for step in response.split(separator) if step.strip())


def tagged(response: str | Steps, how: StepFormat, separator: str) -> str:
    """With a tag after each step; a text that has tags already is taken as it is. White space is no such sign."""
    mark = how.tag.strip()
    if isinstance(response, str) and mark and mark in response:
        return response
    return how.joint.join(step + how.tag for step in steps_of(response, separator))


def turns(messages: Sequence[Message], steps: Sequence[str], answer: str) -> tuple[Message, ...]:
    """The first step continues the user's last turn; each is answered."""
    *before, question = messages
    spoken = [f"{question.content} {steps[0]}", *steps[1:]] if steps else [question.content]
    pairs = [(Message("user", text), Message("assistant", answer)) for text in spoken]
    return (*before, *(message for pair in pairs for message in pair))


def find_ends(whole: str, begin: int, steps: Sequence[str]) -> tuple[int, ...] | None:
    """Where each step ends in the rendered text of prompt and response, in characters; None where one is not found.

    `begin` is where the response may begin at the earliest. White space around a step does not count: templates trim.
    """
    ends = []
    for step in steps:
        text = step.strip()
        found = whole.find(text, begin)
        if found < 0 or not text:
            return None
        begin = found + len(text)
        ends.append(begin)
    return tuple(ends)


def check_ids(response: Response, field: str, how: StepFormat) -> None:
    """Raises InvalidRequest for ids whose steps' ends are not given, or cannot be heeded."""
    if isinstance(response, StepIds):
        if how.style in (StepStyle.TAGGED, StepStyle.TURNS):
            raise InvalidRequest(
                f"{field}.step_ends", "this model finds its steps by a tag among the ids; leave it out"
            )
        count = len(response.data) // 4
        ends = response.ends
        if any(not 0 < end <= count for end in ends) or any(a >= b for a, b in pairwise(ends)):
            raise InvalidRequest(f"{field}.step_ends", f"must ascend, between 1 and the response's {count} tokens")
    elif isinstance(response, TokenIds) and how.style in (StepStyle.ENDS, StepStyle.APART):
        raise InvalidRequest(f"{field}.step_ends", "says where the steps of token_ids end; give it, or text")
