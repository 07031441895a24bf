"""Rendezvous hashing and the cool-down, without any network."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewardserve.client import Rendered, TokenIds, messages
from rewardserve.client.endpoints import Endpoints, rendezvous_order

NAMES = st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)
KEYS = st.binary(max_size=20)


@given(NAMES, KEYS, st.randoms())
def test_the_order_depends_on_names_and_key_alone(names, key, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    assert rendezvous_order(names, key) == rendezvous_order(shuffled, key)
    assert sorted(rendezvous_order(names, key)) == sorted(names)


@given(NAMES, KEYS, st.data())
def test_an_endpoint_that_leaves_moves_only_its_own_prompts(names, key, data):
    gone = data.draw(st.sampled_from(names))
    before = rendezvous_order(names, key)
    assert rendezvous_order([name for name in names if name != gone], key) == [n for n in before if n != gone]


def test_prompts_spread_evenly():
    names = [f"host-{n}:50051" for n in range(4)]
    shares = Counter(rendezvous_order(names, str(n).encode())[0] for n in range(4000))
    assert all(800 < shares[name] < 1200 for name in names)


def test_other_processes_choose_the_same():
    code = (
        "from rewardserve.client import messages; from rewardserve.client.endpoints import rendezvous_order; "
        "print(rendezvous_order(['a:1', 'b:1', 'c:1'], messages.prompt_key(messages.prompt('hello'))))"
    )
    here = rendezvous_order(["a:1", "b:1", "c:1"], messages.prompt_key(messages.prompt("hello")))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert there.strip() == str(here)


def test_the_key_is_the_prompt_and_its_kind():
    turn = {"role": "user", "content": "hello"}
    prompts = ["hello", Rendered("hello"), [turn], [turn, turn], TokenIds([1]), TokenIds([1, 2])]
    keys = {messages.prompt_key(messages.prompt(prompt)) for prompt in prompts}
    assert len(keys) == len(prompts)
    assert messages.prompt_key(messages.prompt([dict(turn)])) in keys


@pytest.fixture
def clock():
    now = [0.0]
    return now


def test_an_unavailable_endpoint_is_avoided_until_it_has_cooled_down(clock):
    endpoints = Endpoints(["a", "b", "c"], cool_down_s=2.0, clock=lambda: clock[0])
    first, second, third = rendezvous_order(endpoints.names, b"key")
    assert endpoints.choose(b"key") == first
    endpoints.unavailable(first)
    assert endpoints.choose(b"key") == second
    assert endpoints.choose(b"key", {second}) == third
    clock[0] = 2.5
    assert endpoints.choose(b"key") == first


def test_an_endpoint_that_answers_is_no_longer_avoided(clock):
    endpoints = Endpoints(["a", "b"], cool_down_s=2.0, clock=lambda: clock[0])
    first = endpoints.choose(b"key")
    endpoints.unavailable(first)
    endpoints.answered(first)
    assert endpoints.choose(b"key") == first


@given(st.sets(st.sampled_from("abc")))
def test_there_is_always_a_choice_even_if_all_are_cooling(tried):
    endpoints = Endpoints(["a", "b", "c"], cool_down_s=2.0, clock=lambda: 0.0)
    for name in endpoints.names:
        endpoints.unavailable(name)
    if len(tried) < 3:
        assert endpoints.choose(b"key", tried) in set("abc") - tried
