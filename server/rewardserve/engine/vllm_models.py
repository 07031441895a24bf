"""A model in vLLM's processes: what kinds there are, and how each is asked for the score of token ids."""

import abc
from collections.abc import AsyncIterator, Sequence
from typing import Any

import tokenizers

from rewardserve.engine.base import EngineInfo
from rewardserve.engine.judge import Unreadable, read_verdict
from rewardserve.engine.vllm_engine import ItemFailed, ModelGone, Scored
from rewardserve.models.checkpoint import first_line
from rewardserve.types import ItemCode, ItemFailure, VerdictFormat


class VllmModel(abc.ABC):
    """A model in vLLM's processes, spoken to from the event loop it was loaded on."""

    def __init__(self, llm: Any, info: EngineInfo, max_batch_tokens: int, max_batch_sequences: int) -> None:
        self.info = info
        self.max_batch_tokens, self.max_batch_sequences = max_batch_tokens, max_batch_sequences
        self._llm = llm

    @abc.abstractmethod
    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        """Raises ItemFailed or ModelGone. Cancelling it aborts the item, wherever it is."""

    async def _last_of(self, outputs: AsyncIterator[Any]) -> Any:
        """Raises ItemFailed or ModelGone."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        output = None
        try:
            async for answer in outputs:
                output = answer
        except VLLMClientError as error:
            raise ItemFailed(ItemFailure(ItemCode.INVALID_ARGUMENT, f"vLLM refuses it: {first_line(error)}")) from error
        except EngineDeadError as error:
            raise ModelGone("vLLM's engine core has died; its log says why") from error
        except EngineGenerateError as error:
            reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            if self.is_gone:  # what hands out vLLM's answers has died: all that is there would fail, whatever it is
                raise ModelGone(f"vLLM can hand out no answers any more: {reason}") from error
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"the forward failed: {reason}")) from error
        flaw = None if output is None else getattr(output, "error", None)
        if output is None or flaw is not None:
            reason = "vLLM gave no answer" if flaw is None else flaw.message
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"the forward failed: {reason}"))
        return output

    async def ping(self) -> None:
        await self._llm.is_sleeping()  # the engine core is asked, which looks for questions between its steps

    @property
    def is_gone(self) -> bool:
        return bool(self._llm.errored)


class Classifier(VllmModel):
    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        raw = PoolingParams(task="classify", use_activation=False)
        # Lower is first with vLLM, higher is first with us.
        output = await self._last_of(self._llm.encode(tokens_input(token_ids), raw, item_id, priority=-priority))
        values = output.outputs.data.flatten().tolist()
        if len(values) != 1:
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"vLLM gave {len(values)} values instead of one score"))
        return Scored(values[0], output.num_cached_tokens)


class WritingJudge(VllmModel):
    """Writes what is likeliest, token by token, so that the same question has the same verdict."""

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        max_batch_tokens: int,
        max_batch_sequences: int,
        verdict: VerdictFormat,
        tokenizer: tokenizers.Tokenizer,
        ends: Sequence[int],
    ) -> None:
        """`ends`: ids that end what it writes."""
        super().__init__(llm, info, max_batch_tokens, max_batch_sequences)
        self._verdict, self._tokenizer, self._ends = verdict, tokenizer, list(ends)

    async def score(self, item_id: str, token_ids: list[int], priority: int) -> Scored:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=self._verdict.max_tokens,
            stop_token_ids=self._ends,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._last_of(self._llm.generate(tokens_input(token_ids), greedy, item_id, priority=-priority))
        written = output.outputs[0]
        try:
            if written.finish_reason not in ("stop", "length"):  # it was cut off: what is there may end in a verdict
                raise ItemFailed(ItemFailure(ItemCode.INTERNAL, f"vLLM ended it: {written.finish_reason}"))
            if written.finish_reason == "length":
                raise Unreadable(f"it came to no end within max_tokens = {self._verdict.max_tokens}")
            said = list(written.token_ids)[:-1]  # the last one ended it: not every tokenizer knows it to be no text
            verdict = read_verdict(self._tokenizer.decode(said), self._verdict)
        except Unreadable as error:
            message = f"the judge's verdict cannot be read: {error}"
            raise ItemFailed(ItemFailure(ItemCode.INTERNAL, message, is_of_the_score=True)) from error
        return Scored(verdict.score, output.num_cached_tokens or 0, verdict.criteria)
