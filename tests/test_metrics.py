"""Our histogram is prometheus-client's to whoever scrapes it, and loses nothing."""

import re
import threading
from pathlib import Path

import prometheus_client
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strictly_parsed
from prometheus_client.parser import text_string_to_metric_families as parsed
from rewardserve.metrics import SCORES, SECONDS, Histogram, Metrics, ModelMetrics

RULES = Path(__file__).parents[1] / "docs" / "alerts.yml"

values = st.one_of(st.sampled_from(sorted({*SCORES, *SECONDS})), st.integers(-50, 50).map(lambda i: i / 4))
labelled = st.lists(st.tuples(st.sampled_from(["m", 'q"\\']), st.lists(values, max_size=8)), max_size=5)


def lines(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@settings(max_examples=100)
@given(observations=labelled, bounds=st.sampled_from([SCORES, SECONDS]))
def test_a_scrape_says_what_prometheus_clients_own_histogram_says(observations, bounds) -> None:
    theirs_registry, ours_registry = CollectorRegistry(), CollectorRegistry()
    theirs = prometheus_client.Histogram("score", "Scores.", ("model",), buckets=bounds, registry=theirs_registry)
    ours = Histogram("score", "Scores.", ("model",), bounds)
    ours_registry.register(ours)
    for model, numbers in observations:
        for number in numbers:
            theirs.labels(model).observe(number)
        ours.labels(model).observe_all(numbers[:4])
        for number in numbers[4:]:
            ours.labels(model).observe(number)
        theirs.labels(model)
    told = lines(theirs_registry)
    if bounds[0] < 0:  # without a sum, which OpenMetrics wants together or not at all
        told = [line for line in told if not line.startswith("score_count")]
    assert lines(ours_registry) == told


def test_a_scrape_is_read_strictly_in_both_formats() -> None:
    """As it is of a server that has done everything there are series for."""
    registry = CollectorRegistry()
    model = ModelMetrics(Metrics(registry), "m")
    model.count_request("OK")
    model.count_item_failure("INTERNAL")
    model.count_rejection("queue")
    model.set_info("v1", "LlamaForSequenceClassification", "packed", "float32")
    model.watch_in_flight(lambda: 1.0, lambda: 2.0)
    for observed in (model.score, model.batch_tokens, model.batch_pairs, *model.stages.values()):
        observed.observe_all([0.5, 3.0])
    model.score.observe(-2.5)
    model.score_sum.inc(-2.5)
    names = []
    for accept, parse in (("application/openmetrics-text;version=1.0.0", strictly_parsed), ("text/plain", parsed)):
        encode, content_type = choose_encoder(accept)
        assert content_type.startswith(accept.split(";")[0])
        samples = [sample for family in parse(encode(registry).decode()) for sample in family.samples]
        names.append({sample.name for sample in samples if not sample.name.endswith("_created")})
    assert names[0] == names[1]
    assert {"rewardserve_score_total", "rewardserve_score_bucket", "rewardserve_batch_tokens_count"} <= names[0]


def test_a_name_that_is_taken_is_refused() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry)


def test_scrapes_in_between_lose_nothing_and_agree_with_themselves() -> None:
    registry = CollectorRegistry()
    model = ModelMetrics(Metrics(registry), "m")
    done = threading.Event()
    counts: list[float] = []

    def scrape() -> None:
        while not done.is_set():
            samples = {
                (sample.name, sample.labels.get("le")): sample.value
                for family in registry.collect()
                for sample in family.samples
                if sample.name.startswith("rewardserve_batch_pairs_")
            }
            count = samples["rewardserve_batch_pairs_count", None]
            assert count == samples["rewardserve_batch_pairs_bucket", "+Inf"]
            counts.append(count)

    failures: list[BaseException] = []
    threading.excepthook, before = lambda hook: failures.append(hook.exc_value), threading.excepthook
    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for number in range(20_000):
            model.batch_pairs.observe_all([float(number % 40)] * 3)
    finally:
        done.set()
        thread.join()
        threading.excepthook = before
    assert not failures
    assert counts == sorted(counts)
    assert registry.get_sample_value("rewardserve_batch_pairs_count", {"model": "m"}) == 60_000
    assert registry.get_sample_value("rewardserve_batch_pairs_bucket", {"model": "m", "le": "4.0"}) == 3 * 5 * 500


def test_what_is_in_flight_is_asked_for_at_the_scrape() -> None:
    registry = CollectorRegistry()
    in_flight = [3.0, 400.0]
    ModelMetrics(Metrics(registry), "m").watch_in_flight(lambda: in_flight[0], lambda: in_flight[1])
    in_flight[:] = [5.0, 600.0]
    assert registry.get_sample_value("rewardserve_in_flight_requests", {"model": "m"}) == 5
    assert registry.get_sample_value("rewardserve_in_flight_tokens", {"model": "m"}) == 600


def test_a_request_whose_model_is_not_known_is_counted_without_one() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    ModelMetrics(metrics, "m").count_request("OK")
    metrics.count_request_of_no_model("NOT_FOUND")
    assert registry.get_sample_value("rewardserve_requests_total", {"model": "", "status": "NOT_FOUND"}) == 1
    assert registry.get_sample_value("rewardserve_requests_total", {"model": "m", "status": "NOT_FOUND"}) is None


def test_the_rules_ask_for_nothing_that_there_is_not() -> None:
    """docs/alerts.yml names series that a server has, or that a rule of it records."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.watch_drift("m", lambda: 0.0)
    model = ModelMetrics(metrics, "m")
    model.count_item_failure("INTERNAL")
    model.count_rejection("queue")
    there = {sample.name for family in registry.collect() for sample in family.samples}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        asked = set(re.findall(r"\brewardserve[_:]\w+(?::\w+)*", rule["expr"]))
        assert asked <= there | recorded and (asked or rule["expr"].startswith("up{")), asked - there - recorded
        assert "record" in rule or rule["annotations"].keys() == {"summary", "do"}
