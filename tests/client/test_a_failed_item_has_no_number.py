"""No failure of one response can be read as a reward, and no reply that does not fit is believed."""

import pickle

import grpc
import pytest
from google.rpc import status_pb2
from rewardserve.client import AsyncRewardClient, Group, ItemFailed, ServerError, messages
from rewardserve.v1 import scoring_pb2

Code = grpc.StatusCode
GROUP = Group("prompt", ["good", "too long"], id="g")


async def test_reading_the_score_of_a_failed_item_raises(server):
    async with AsyncRewardClient(server.target) as client:
        good, failed = (await client.score([GROUP])).groups[0].items
    assert good.ok and isinstance(good.score, float) and good.kind == "raw_logit"
    assert not failed.ok and failed.score_or_none is None
    with pytest.raises(ItemFailed, match="too long") as raised:
        _ = failed.score
    assert raised.value.code is failed.status.code is Code.OUT_OF_RANGE


async def test_the_scores_of_a_group_raise_if_one_is_missing(server):
    async with AsyncRewardClient(server.target) as client:
        group = (await client.score([GROUP])).groups[0]
    with pytest.raises(ItemFailed):
        _ = group.scores


async def test_a_comparison_with_a_failed_response_has_no_margin(server):
    async with AsyncRewardClient(server.target) as client:
        result = await client.compare("prompt", "good", "too long")
        tie = await client.compare("prompt", "good", "good")
    assert result.a.ok and result.margin_or_none is None and result.probability_a_or_none is None
    for name in ("margin", "probability_a"):
        with pytest.raises(ItemFailed, match="too long"):
            getattr(result, name)
    assert tie.margin == 0.0 and tie.probability_a == 0.75


async def test_a_failed_response_has_no_rank(server):
    async with AsyncRewardClient(server.target) as client:
        result = await client.rank("prompt", ["a", "too long", "b", "c"], top_k=2)
        hopeless = await client.rank("prompt", ["too long"])
    assert len(result.ranked) == 2 and result.best.item.score >= result.ranked[1].item.score
    assert [each.index for each in result.failed] == [1]
    with pytest.raises(ItemFailed):
        _ = hopeless.best


@pytest.mark.parametrize(
    "item",
    [
        scoring_pb2.ItemScore(),  # OK, and no score
        scoring_pb2.ItemScore(score=float("nan")),
        scoring_pb2.ItemScore(score=float("inf")),
        scoring_pb2.ItemScore(score=1.0, status=status_pb2.Status(code=13, message="broken")),
        scoring_pb2.ItemScore(score=1.0, status=status_pb2.Status(code=4711)),
    ],
)
def test_no_malformed_item_yields_a_number(item):
    with pytest.raises(ItemFailed):
        _ = messages.item_score(item).score


def _drop_group(reply):
    del reply.groups[0]


def _drop_item(reply):
    del reply.groups[1].items[0]


@pytest.mark.parametrize("damage", [_drop_group, _drop_item])
async def test_scores_that_slipped_are_refused(server, damage):
    server.servicer.change_reply = damage
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(ServerError, match="does not fit"):
            await client.score([Group("p", ["a", "b"]), Group("q", ["c", "d"])])


@pytest.mark.parametrize("index", [1, 7, -1])
async def test_ranks_that_do_not_fit_are_refused(server, index):
    def damage(reply):
        reply.ranked[0].index = index if index != 1 else reply.ranked[1].index

    server.servicer.change_reply = damage
    async with AsyncRewardClient(server.target) as client:
        with pytest.raises(ServerError, match="do not fit"):
            await client.rank("p", ["a", "b"])


async def test_results_can_be_pickled(server):
    async with AsyncRewardClient(server.target) as client:
        result = await client.score([GROUP])
    assert pickle.loads(pickle.dumps(result)) == result
