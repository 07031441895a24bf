"""Groups over ScoreStream: a window of them in flight, each tried again by itself when its stream breaks."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from typing import Any, TypeAlias

from rewardserve.client import messages, types
from rewardserve.client.calls import Calls
from rewardserve.client.channels import SCORE, Channels
from rewardserve.client.errors import RewardClientError, VersionMismatch
from rewardserve.client.link import Link, StreamRefused
from rewardserve.client.retry import Deadline
from rewardserve.v1 import scoring_pb2

Outcome: TypeAlias = types.GroupScore | RewardClientError
Finished: TypeAlias = tuple[types.Group, Outcome]
Groups: TypeAlias = Iterable[types.Group] | AsyncIterable[types.Group]

_FAREWELL_S = 1.0  # for the server to end a stream that we have half-closed


class StreamScorer:
    """Scores groups over one stream per endpoint. At most `window` groups are between `submit` and `take`."""

    def __init__(
        self, channels: Channels, calls: Calls, template: scoring_pb2.ScoreRequest, timeout_s: float, window: int
    ) -> None:
        if window < 1:
            raise ValueError(f"window is at least 1, not {window}")
        self._channels = channels
        self._calls = calls
        self._template = template  # model and options of every request; its request_id begins theirs
        self._timeout_s = timeout_s
        self._window = window
        self._numbers = itertools.count()
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: asyncio.Queue[tuple[types.Group, Outcome | Exception]] = asyncio.Queue()
        self._model: scoring_pb2.ModelVersion | None = None  # set by the first answer
        self.num_open = 0  # submitted and not yet taken

    @property
    def is_full(self) -> bool:
        return self.num_open >= self._window

    def submit(self, group: types.Group) -> None:
        """Begins to score it. Its time runs from here. Raises TypeError, ValueError for what is not a group."""
        message = messages.group(group)
        self.num_open += 1
        task = asyncio.get_running_loop().create_task(self._score(group, message, Deadline.after(self._timeout_s)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def take(self) -> Finished:
        """The next one that is finished. Raises VersionMismatch: then nothing that follows could be compared."""
        group, outcome = await self._finished.get()
        self.num_open -= 1
        return group, outcome_of(outcome)

    async def exchange(self, group: types.Group) -> list[tuple[types.Group, Outcome | Exception]]:
        """Submits one and takes all that are finished, without waiting.

        What `take` would raise is among them, for `outcome_of` to raise in its turn: those before it are results.
        """
        self.submit(group)
        finished = [self._finished.get_nowait() for _ in range(self._finished.qsize())]
        self.num_open -= len(finished)
        return finished

    async def close(self) -> None:
        """Gives up what is not finished; politely if nothing is."""
        farewell_s = 0.0 if self._tasks else _FAREWELL_S
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close(farewell_s) for link in self._links.values()))
        self._links.clear()

    async def _score(self, group: types.Group, message: scoring_pb2.Group, deadline: Deadline) -> None:
        outcome: Outcome | Exception
        try:
            outcome = await self._answer(message, deadline)
        except Exception as error:  # a RewardClientError is the group's outcome; anything else is raised by take()
            outcome = error
        self._finished.put_nowait((group, outcome))

    async def _answer(self, message: scoring_pb2.Group, deadline: Deadline) -> types.GroupScore:
        async def send(endpoint: str, timeout_s: float) -> scoring_pb2.ScoreResponse:
            request = self._request(message, timeout_s)
            try:
                return await self._link(endpoint).ask(request, timeout_s)
            except StreamRefused:  # each by itself, so that none fails for another
                return await self._channels.call(SCORE, request, endpoint, deadline.remaining_s())

        endpoint, reply = await self._calls.one(send, messages.prompt_key(message.prompt), deadline)
        result = messages.score_result(reply.request_id, [message], [messages.Part(endpoint, (0,), reply)])
        self._model = self._model or reply.model
        messages.one_version([("before", self._model), (endpoint, reply.model)])
        return result.groups[0]

    def _request(self, message: scoring_pb2.Group, timeout_s: float) -> scoring_pb2.ScoreRequest:
        """`timeout_s`: after which nobody waits for it any more, and the server need not compute it."""
        request = scoring_pb2.ScoreRequest(groups=[message])
        request.MergeFrom(self._template)
        request.timeout_s = max(0.0, timeout_s)
        request.request_id = f"{self._template.request_id}.{next(self._numbers)}"  # a new one for each attempt
        self._channels.check_size(request)
        return request

    def _link(self, endpoint: str) -> Link:
        link = self._links.get(endpoint)
        if link is None or link.ended:
            link = self._links[endpoint] = Link(self._channels, endpoint)
        return link


def outcome_of(outcome: Outcome | Exception) -> Outcome:
    """The outcome of one group. Raises what is the end of the stream instead."""
    if isinstance(outcome, VersionMismatch) or not isinstance(outcome, Outcome):
        raise outcome
    return outcome


async def pump(scorer: StreamScorer, groups: Groups) -> AsyncGenerator[Finished, None]:
    """Feeds the scorer while there is room and yields what is finished; neither waits for the other. Closes it."""
    source = _iterate(groups)
    upcoming: asyncio.Task[types.Group] | None = asyncio.ensure_future(anext(source))
    taking: asyncio.Task[Finished] | None = None
    try:
        while upcoming or scorer.num_open:
            if taking is None and scorer.num_open:
                taking = asyncio.ensure_future(scorer.take())
            waiting = {task for task in (taking, None if scorer.is_full else upcoming) if task is not None}
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if upcoming in done:
                upcoming = _submit_next(scorer, upcoming, source)
            if taking in done:
                finished, taking = await taking, None
                yield finished
    finally:
        await _cancel(upcoming, taking)
        await source.aclose()
        await scorer.close()


async def _iterate(groups: Groups) -> AsyncGenerator[types.Group, None]:
    if isinstance(groups, AsyncIterable):
        async for group in groups:
            yield group
    else:
        for group in groups:
            yield group


def _submit_next(
    scorer: StreamScorer, upcoming: asyncio.Task[types.Group], source: AsyncIterator[types.Group]
) -> asyncio.Task[types.Group] | None:
    """Hands the group over and asks for the one after it; None at the end. Raises what the caller's iterable raised."""
    try:
        group = upcoming.result()
    except StopAsyncIteration:
        return None
    scorer.submit(group)
    return asyncio.ensure_future(anext(source))


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
