"""A request's prompts and responses -> token ids: templates, the border of prompt and response, what is too long."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from rewardserve.errors import InvalidRequest
from rewardserve.text.chat_template import TEMPLATE_ERRORS
from rewardserve.text.placing import EMPTY, EncodedItem, EncodedRequest, Groups, Placer, too_long
from rewardserve.text.steps import BY_END, check_ids, find_ends, steps_of, tagged, turns
from rewardserve.text.tokenizer import Ids, Tokenizer, Whole
from rewardserve.types import (
    Conversation,
    ItemCode,
    ItemFailure,
    JudgeFormat,
    Message,
    Overflow,
    PlainText,
    Prompt,
    PromptGroup,
    ScoreRequest,
    StepFormat,
    StepIds,
    Steps,
    StepStyle,
    TokenIds,
)

__all__ = ["Abandoned", "EncodedItem", "EncodedRequest", "Encoder", "is_quickly_encoded"]

# At most 0.3 ms of the event loop's time. Handing a small request to a thread and back costs it 0.1 ms.
QUICK_IDS_BYTES = 1 << 20
QUICK_PAIRS = 256
BATCH_CHARACTERS = 1 << 20  # tokenized at once: half a second, which is what is lost when the caller has left
MAX_CUT_CHARACTERS = 4 << 20  # of a text to be truncated, which cannot be tokenized in part: two seconds

PLACE = "\x02the response\x03"  # where it goes, in a text that a template renders once for all responses
_NEVER = threading.Event()
_NO_IDS = np.empty(0, np.int32)
_Wholes = dict[int, Whole | ItemFailure]  # by the response's position


class Abandoned(Exception):
    """Nobody waits for these ids any more."""


@dataclass(frozen=True, slots=True)
class _Job:
    group: PromptGroup
    field: str  # what the group is called in errors
    overflow: Overflow
    steps: StepFormat | None  # how responses are cut into steps, if they are
    separator: str  # of steps, in texts
    cache_response: bool
    abandoned: threading.Event


class Encoder:
    """One model's. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_length: int,
        no_tokenizer_reason: str = "",
        bos_token_id: int | None = None,
        appended: int | None = None,
        steps: StepFormat | None = None,
        judge: JudgeFormat | None = None,
    ) -> None:
        """`bos_token_id` is the model's; a tokenizer knows better. `appended`: the id that every sequence is to end in.

        `steps` are how a process reward model is shown steps; other models are read at their ends, if asked for.
        """
        self.tokenizer = tokenizer
        self._appended = appended
        self._steps = steps
        self._judge = judge
        self._bos_token_id = bos_token_id if tokenizer is None else tokenizer.bos_token_id
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._no_tokenizer_reason = no_tokenizer_reason

    def encode(self, request: ScoreRequest, abandoned: threading.Event = _NEVER) -> EncodedRequest:
        """Raises InvalidRequest, naming the field, for ids or text that no model could take.

        Raises Abandoned soon after `abandoned` is set: at the next group, or the next batch of a group's texts.
        """
        groups, items = Groups(), []
        steps = self._steps or (BY_END if request.by_step else None)
        separator = request.step_separator or (steps or BY_END).separator
        by_end = steps is not None and steps.style in (StepStyle.ENDS, StepStyle.APART)
        plain = self._appended is None and not by_end and not request.cache_response and self._judge is None
        for number, group in enumerate(request.groups):
            groups.new_request_group()
            cached = request.cache_response
            # A judge's question comes after the response: cut, it would be another question.
            overflow = request.overflow if self._judge is None else Overflow.ERROR
            job = _Job(group, f"groups[{number}]", overflow, steps, separator, cached, abandoned)
            items.append((plain and self._as_sent(group, groups)) or self._encode_group(job, groups))
        return EncodedRequest(groups.build(), tuple(items))

    def _as_sent(self, group: PromptGroup, groups: Groups) -> tuple[EncodedItem, ...]:
        """A group of nothing but good ids that all fit, as trainers send them: its bytes go on as they came.

        Empty if it is anything else; `_encode_group` then finds the same for what is good, and a name for what is not.
        """
        ids = _ids_of(group)
        if not ids or any([len(data) % 4 for data in ids]):
            return ()
        prompt, *responses = ids
        longest, shortest = max(map(len, responses)), min(map(len, responses))
        if shortest == 0 or len(prompt) + longest > 4 * self._max_length:
            return ()
        # Unsigned, negative ids are larger than any vocabulary.
        if int(np.frombuffer(b"".join(ids), "<u4").max()) >= self._vocab_size:
            return ()
        return groups.add_all(prompt, responses)

    def _encode_group(self, job: _Job, groups: Groups) -> tuple[EncodedItem, ...]:
        _check_wanted(job.abandoned)
        for i, response in enumerate(job.group.responses):
            if job.steps is not None or isinstance(response, StepIds):
                check_ids(response, f"{job.field}.responses[{i}]", job.steps or BY_END)
        prompt, wholes = self._after_ids(job) if isinstance(job.group.prompt, TokenIds) else self._after_text(job)
        placer = Placer(
            groups,
            prompt,
            job.overflow,
            self._max_length,
            self._bos_token_id,
            self._appended,
            job.cache_response,
        )
        return placer.place([wholes[i] for i in range(len(job.group.responses))])

    def _after_ids(self, job: _Job) -> tuple[Ids, _Wholes]:
        """Ids of the prompt, and what becomes of each response. Text after ids is verbatim."""
        assert isinstance(job.group.prompt, TokenIds)
        if self._judge is not None:
            raise InvalidRequest(f"{job.field}.prompt.token_ids", "a judge is asked in words; send text")
        prompt = self._ids(job.group.prompt, f"{job.field}.prompt.token_ids")
        wholes: _Wholes = dict(self._responses_of_ids(job, len(prompt)))
        texts = [(i, r) for i, r in enumerate(job.group.responses) if isinstance(r, str | Steps)]
        if texts:
            field = f"{job.field}.responses[{texts[0][0]}].text"
            tokenizer = self._tokenizer_for(field)
            if job.steps is not None and job.steps.style is not StepStyle.TAGGED:
                raise InvalidRequest(field, "after token_ids the steps of a text are not known; send both as text")
            shown = [(i, _shown(text, job)) for i, text in texts]
            wholes |= self._texts(
                shown,
                len(prompt),
                job,
                lambda batch: [Whole(len(prompt), tail) for tail in tokenizer.encode([text for _, text in batch])],
            )
        return prompt, wholes

    def _after_text(self, job: _Job) -> tuple[Ids, _Wholes]:
        tokenizer = self._tokenizer_for(f"{job.field}.prompt")
        if job.steps is not None and job.steps.style is StepStyle.APART:
            return self._apart(job, tokenizer, job.steps)
        whole_text = self._whole_text(job)
        prompt = tokenizer.prompt(whole_text(None))
        by_end = job.steps is not None and job.steps.style is StepStyle.ENDS
        num_after: int | None = None  # ids after a response, of a judge's question

        def encode(batch: list[tuple[int, str]]) -> list[Whole]:
            nonlocal num_after
            is_first = prompt.ids is None
            if by_end and batch:
                wholes = [tokenizer.encode_steps(prompt, text, ends[i]) for i, text in batch]
            else:
                wholes = tokenizer.encode_after(prompt, [text for _, text in batch])
            assert prompt.ids is not None
            if is_first:
                self._check_range(prompt.ids, f"{job.field}.prompt")
            if self._judge is None:
                return wholes
            if num_after is None:
                (question,) = tokenizer.encode_after(prompt, [whole_text("")])
                num_after = len(question) - len(prompt.ids)
            return [replace(whole, num_after=num_after) for whole in wholes]

        responses = [(i, r) for i, r in enumerate(job.group.responses) if isinstance(r, str | Steps)]
        ends: dict[int, tuple[int, ...]] = {}
        wholes: _Wholes = {}
        if job.steps is not None and job.steps.style is StepStyle.TURNS:  # without a step the question would be one
            nothing = ItemFailure(ItemCode.INVALID_ARGUMENT, EMPTY)
            wholes = {i: nothing for i, response in responses if not steps_of(response, job.separator)}
        if by_end:
            placed = whole_text(PLACE)
            for i, response in responses:
                found = self._ends(response, whole_text, placed, job)
                if isinstance(found, ItemFailure):
                    wholes[i] = found
                else:
                    ends[i] = found
        texts = ((i, whole_text(response)) for i, response in responses if i not in wholes)
        wholes |= self._texts(texts, 0, job, encode)
        least = tokenizer.least_tokens(prompt.text)
        for i, after_nothing in self._responses_of_ids(job, 0):
            refusal = self._refusal(least + len(after_nothing), len(prompt.text), job.overflow)
            if refusal is None and prompt.ids is None:
                _check_wanted(job.abandoned)
                encode([])
            wholes[i] = refusal or _moved(after_nothing, len(prompt.ids))
        return _NO_IDS if prompt.ids is None else prompt.ids, wholes

    def _ends(
        self, response: str | Steps, whole_text: Callable[[str | Steps | None], str], placed: str, job: _Job
    ) -> tuple[int, ...] | ItemFailure:
        """Where its steps end in the whole text, in characters. `placed` is that of PLACE: it differs from where a
        response begins, which may be before the prompt's end, where that opens what a response opens too (<think>).
        """
        whole, steps = whole_text(response), steps_of(response, job.separator)
        begin = next((n for n, (a, b) in enumerate(zip(placed, whole, strict=False)) if a != b), 0)
        found = find_ends(whole, begin, steps)
        if not steps:
            return ItemFailure(ItemCode.INVALID_ARGUMENT, EMPTY)
        if empty := [number for number, step in enumerate(steps) if not step.strip()]:
            return ItemFailure(ItemCode.INVALID_ARGUMENT, f"step {empty[0]} is empty: no token to read")
        if found is None:
            return ItemFailure(ItemCode.INVALID_ARGUMENT, "the model's chat template changes a step; send token_ids")
        return found

    def _apart(self, job: _Job, tokenizer: Tokenizer, how: StepFormat) -> tuple[Ids, _Wholes]:
        prompt = job.group.prompt
        if isinstance(prompt, Conversation):
            raise InvalidRequest(
                f"{job.field}.prompt.conversation", "this model takes a bare question; send it as text"
            )
        assert not isinstance(prompt, TokenIds)
        ids, _ = tokenizer.encode_apart(prompt.text, (), how.tag)
        self._check_range(ids, f"{job.field}.prompt")
        wholes: _Wholes = dict(self._responses_of_ids(job, len(ids)))
        for i, response in enumerate(job.group.responses):
            if isinstance(response, str | Steps):
                _check_wanted(job.abandoned)
                text = response if isinstance(response, str) else how.tag.join(response.texts)
                if refusal := self._text_refusal(text, len(ids), job.overflow):
                    wholes[i] = refusal
                    continue
                # As their authors do: an empty step between two separators is a step.
                steps = response.texts if isinstance(response, Steps) else tuple(response.split(job.separator))
                _, wholes[i] = tokenizer.encode_apart(prompt.text, steps if text else (), how.tag)
                self._check_range(wholes[i].tail, f"{job.field}.responses[{i}].text", len(ids))
        return ids, wholes

    def _texts(
        self,
        texts: Iterable[tuple[int, str]],
        num_ids: int,
        job: _Job,
        encode: Callable[[list[tuple[int, str]]], list[Whole]],
    ) -> _Wholes:
        """Those that may fit after `num_ids` ids go through `encode`, a batch at a time."""
        wholes: _Wholes = {}
        for batch in _batches(texts):
            _check_wanted(job.abandoned)
            wholes |= {i: refusal for i, text in batch if (refusal := self._text_refusal(text, num_ids, job.overflow))}
            fitting = [(i, text) for i, text in batch if i not in wholes]
            encoded = encode(fitting) if fitting else []
            for (i, _), whole in zip(fitting, encoded, strict=True):
                self._check_range(whole.tail, f"{job.field}.responses[{i}].text", whole.border)
                wholes[i] = whole
        return wholes

    def _responses_of_ids(self, job: _Job, border: int) -> Iterator[tuple[int, Whole]]:
        """Each after a prompt of `border` tokens."""
        for i, response in enumerate(job.group.responses):
            if isinstance(response, TokenIds | StepIds):
                ids = self._ids(response, f"{job.field}.responses[{i}].token_ids")
                ends = response.ends if isinstance(response, StepIds) and job.steps is not None else ()
                yield i, Whole(border, ids, tuple(border + end - 1 for end in ends))

    def _text_refusal(self, text: str, num_ids: int, overflow: Overflow) -> ItemFailure | None:
        assert self.tokenizer is not None
        if not text:  # a failure of its own
            return None
        return self._refusal(num_ids + self.tokenizer.least_tokens(text), len(text), overflow)

    def _refusal(self, least_tokens: int, num_characters: int, overflow: Overflow) -> ItemFailure | None:
        """Why a text fails before it is tokenized; None if it may fit, or may be cut until it does."""
        excess = least_tokens - self._max_length
        if excess <= 0 or (overflow is not Overflow.ERROR and num_characters <= MAX_CUT_CHARACTERS):
            return None
        message = too_long(f"at least {least_tokens}", excess, self._max_length)
        if overflow is not Overflow.ERROR:
            message += f"; of its {num_characters} characters no more than {MAX_CUT_CHARACTERS} may be truncated"
        return ItemFailure(ItemCode.OUT_OF_RANGE, message)

    def _whole_text(self, job: _Job) -> Callable[[str | Steps | None], str]:
        """What makes the prompt's text of None, and of a response the text of both."""
        assert self.tokenizer is not None
        prompt, field, tokenizer = job.group.prompt, job.field, self.tokenizer
        if isinstance(prompt, Conversation) and tokenizer.template is None:
            raise InvalidRequest(
                f"{field}.prompt.conversation", "this checkpoint has no chat template; send text or token_ids"
            )
        messages = _messages(prompt)
        if self._judge is not None:
            return self._question(self._judge, job)
        in_turns = job.steps is not None and job.steps.style is StepStyle.TURNS
        if in_turns and (messages is None or tokenizer.template is None):
            raise InvalidRequest(
                f"{field}.prompt", "this model is shown steps as turns of a conversation; send text or token_ids"
            )
        if in_turns and messages is not None and any(message.role == "assistant" for message in messages):
            raise InvalidRequest(
                f"{field}.prompt.conversation",
                "this model is shown steps as turns of a conversation, and would take an assistant's turn for one; "
                "send a prompt without such turns",
            )
        if tokenizer.template is None or messages is None:
            return lambda response: prompt.text + ("" if response is None else _shown(response, job))

        def render(response: str | Steps | None) -> str:
            try:
                if in_turns and response is not None:
                    assert job.steps is not None
                    spoken = turns(messages, steps_of(response, job.separator), job.steps.tag)
                    return tokenizer.render(spoken[:-1], spoken[-1].content)
                return tokenizer.render(messages, None if response is None else _shown(response, job))
            except TEMPLATE_ERRORS as error:
                raise _refused(field, error) from error

        return render

    def _question(self, judge: JudgeFormat, job: _Job) -> Callable[[str | Steps | None], str]:
        """The judge's turn to speak, after it was asked about a response; of None, what comes before the response."""
        tokenizer, field = self._tokenizer_for(f"{job.field}.prompt"), job.field
        for i, response in enumerate(job.group.responses):
            if isinstance(response, TokenIds | StepIds):
                raise InvalidRequest(f"{field}.responses[{i}].token_ids", "a judge is asked in words; send text")
        # The template's halves first: a prompt may hold the words {response} too.
        before, after = (
            half.replace("{prompt}", transcript(job.group.prompt)) for half in judge.template.split("{response}")
        )
        if tokenizer.template is not None:
            try:
                rendered = tokenizer.render((Message("user", f"{before}{PLACE}{after}"),))
            except TEMPLATE_ERRORS as error:
                raise _refused(field, error) from error
            before, _, after = rendered.partition(PLACE)
        return lambda response: before if response is None else f"{before}{_shown(response, job)}{after}"

    def _tokenizer_for(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(field, f"this model scores token_ids only ({self._no_tokenizer_reason})")
        return self.tokenizer

    def _ids(self, ids: TokenIds | StepIds, field: str) -> Ids:
        if len(ids.data) % 4:
            raise InvalidRequest(field, f"{len(ids.data)} bytes are not a whole number of little-endian int32 ids")
        array = np.frombuffer(ids.data, "<i4")
        self._check_range(array, field)
        return array

    def _check_range(self, ids: Ids, field: str, before: int = 0) -> None:
        """`before` them there are other ids, which errors count."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            wrong = int(np.nonzero((ids < 0) | (ids >= self._vocab_size))[0][0])
            position = before + wrong
            raise InvalidRequest(
                field, f"id {int(ids[wrong])} at position {position} is outside the vocabulary of {self._vocab_size}"
            )


def _shown(response: str | Steps, job: _Job) -> str:
    """The text that a response's turn holds."""
    if job.steps is not None and job.steps.style is StepStyle.TAGGED:
        return tagged(response, job.steps, job.separator)
    return response if isinstance(response, str) else job.separator.join(response.texts)


def transcript(prompt: Prompt) -> str:
    """What a judge is shown of a prompt: plain text as it is, a conversation turn by turn."""
    if isinstance(prompt, Conversation):
        return "\n\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    assert not isinstance(prompt, TokenIds)
    return prompt.text


def _moved(whole: Whole, border: int) -> Whole:
    """What stood after nothing, after a prompt of `border` tokens."""
    return Whole(border, whole.tail, tuple(position + border for position in whole.steps))


def _check_wanted(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise Abandoned


def _refused(field: str, error: Exception) -> InvalidRequest:
    """In the template's words; Python's own are empty sometimes, as those of a MemoryError."""
    return InvalidRequest(f"{field}.prompt", f"the checkpoint's chat template refuses it: {str(error) or repr(error)}")


def _messages(prompt: Prompt) -> tuple[Message, ...] | None:
    """What a template is given; None for text that is used as it stands."""
    match prompt:
        case Conversation(messages):
            return messages
        case PlainText(text):
            return (Message("user", text),)
        case _:
            return None


def _batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for i, text in texts:
        batch.append((i, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def is_quickly_encoded(request: ScoreRequest) -> bool:
    """Whether it is ids, and few of them: encoding it then takes less time than a change of threads."""
    num_bytes = num_pairs = 0
    # Each response may need a copy of its own.
    cuts_prompts = request.overflow is Overflow.TRUNCATE_PROMPT_LEFT or request.cache_response
    for group in request.groups:
        ids = _ids_of(group)
        num_bytes += sum(map(len, ids))
        if cuts_prompts and ids:
            num_bytes += len(ids[0]) * (len(ids) - 2)
        num_pairs += len(group.responses)
        if not ids or num_bytes > QUICK_IDS_BYTES or num_pairs > QUICK_PAIRS:
            return False
    return True


def _ids_of(group: PromptGroup) -> list[bytes]:
    """Of the prompt and each response; empty if one of them is text."""
    parts = (group.prompt, *group.responses)
    ids = [part.data for part in parts if isinstance(part, TokenIds)]
    return ids if len(ids) == len(parts) else []
