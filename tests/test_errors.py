"""Every error has a status on the wire and a place in the drawn tree."""

import re

import grpc
import pytest
from rewardserve import errors
from rewardserve.errors import Draining, InvalidRequest, ItemFailed, Overloaded, RewardServeError, Unavailable
from rewardserve.transport.status import status_of
from rewardserve.types import ItemCode


def walk(cls: type[RewardServeError], depth: int = 0) -> list[tuple[int, type[RewardServeError]]]:
    return [(depth, cls), *(found for sub in cls.__subclasses__() for found in walk(sub, depth + 1))]


# Other modules, tests among them, may derive their own; the tree is about this one.
FAMILY = [(depth, cls) for depth, cls in walk(RewardServeError) if cls.__module__ == errors.__name__]
CONCRETE = [cls for _, cls in FAMILY if cls is not RewardServeError]
DRAWN = re.compile(r"^(?P<branches>[│├└─ ]*)(?P<name>\w+)(?P<rest>.*)$")


def drawing() -> dict[str, tuple[int, str]]:
    """Name -> (depth, what stands behind it)."""
    assert errors.__doc__ is not None
    lines = errors.__doc__.split("\n\n")[1].splitlines()
    matches = [match for line in lines if (match := DRAWN.match(line))]
    return {m["name"]: (len(m["branches"]) // 4, m["rest"].strip()) for m in matches}


def make(cls: type[RewardServeError]) -> RewardServeError:
    if issubclass(cls, InvalidRequest):
        return cls("field", "is wrong")
    if issubclass(cls, ItemFailed):
        return cls(ItemCode.OUT_OF_RANGE.name, "response_a", "too long")
    if issubclass(cls, Overloaded):
        return cls("full", 1.5)
    return cls("because")


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = {name: depth for name, (depth, _) in drawing().items()}
    assert drawn == {cls.__name__: depth for depth, cls in FAMILY}


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_every_error_has_a_status_and_the_tree_says_the_same(cls: type[RewardServeError]) -> None:
    error = make(cls)
    assert error.grpc in grpc.StatusCode.__members__ and error.grpc != "OK"
    words = drawing()[cls.__name__][1].split()
    if "grpc" in vars(cls):
        assert words[0] == cls.grpc
    else:
        assert words[0] not in grpc.StatusCode.__members__, "what is inherited, or differs by item, is not drawn again"


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_every_error_crosses_the_wire_with_its_code_and_its_words(cls: type[RewardServeError]) -> None:
    error = make(cls)
    status = status_of(error)
    assert status.code == grpc.StatusCode[error.grpc].value[0]
    assert status.message == str(error) != ""


@pytest.mark.parametrize("code", ItemCode)
def test_every_items_code_is_a_status(code: ItemCode) -> None:
    assert grpc.StatusCode[code.name].value[0] == code
    assert status_of(ItemFailed(code.name, "response_a", "x")).code == code


def test_an_invalid_request_names_its_field_to_people_and_to_programs() -> None:
    error = InvalidRequest("groups[3].prompt", "must not be empty")
    assert str(error) == "groups[3].prompt: must not be empty"
    assert (error.field, error.description) == ("groups[3].prompt", "must not be empty")
    assert status_of(error).details[0].type_url.endswith("google.rpc.BadRequest")


def test_what_will_be_back_by_itself_says_when_to_ask_again() -> None:
    (detail,) = status_of(Draining("the server is shutting down", 1.0)).details
    assert detail.type_url.endswith("google.rpc.RetryInfo") and len(detail.value) > 0
    assert not status_of(Unavailable("failed for good")).details


def test_overloaded_says_when_to_come_back() -> None:
    detail = status_of(Overloaded("full", 1.5)).details[0]
    assert detail.type_url.endswith("google.rpc.RetryInfo") and len(detail.value) > 0
