"""Every Prometheus series the server has. The registry is passed in; children are bound once per model."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SCORES = (-20, -10, -8, -6, -5, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40)
SPREADS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
STAGES = ("admission", "tokenization", "queue", "compute", "total")


class Observations:
    """One histogram of one model."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one is +Inf's
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_all(self, values: Iterable[float]) -> None:
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            self._sum += value

    def add_to(self, family: Metric, name: str, labels: dict[str, str]) -> None:
        """The samples prometheus-client's own histogram gives. Where values may be negative there is no sum, and then,
        which it overlooks, OpenMetrics wants no count either: it is that of the last bucket.
        """
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), tuple(self._counts), strict=True):
            total += count
            family.add_sample(f"{name}_bucket", {**labels, "le": floatToGoString(bound)}, total)
        if self._bounds[0] >= 0:
            family.add_sample(f"{name}_count", labels, total)
            family.add_sample(f"{name}_sum", labels, self._sum)


class Histogram(Collector):
    """Written on the event loop only, and read by scrapes on their threads.

    prometheus-client's takes a lock and walks the buckets for each observation, and a request has one for each of its
    scores and five for its stages.
    """

    def __init__(self, name: str, text: str, labels: tuple[str, ...], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._children: dict[tuple[str, ...], Observations] = {}

    def labels(self, *values: str) -> Observations:
        return self._children.setdefault(values, Observations(self._bounds))

    def describe(self) -> Iterable[Metric]:
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text)
        for values, child in list(self._children.items()):
            child.add_to(family, self._name, dict(zip(self._labels, values, strict=True)))
        return [family]


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rewardserve_{name}", text, ("model", *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"rewardserve_{name}", text, ("model", *labels), registry=registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            made = Histogram(f"rewardserve_{name}", text, ("model", *labels), bounds)
            registry.register(made)
            return made

        self.requests = counter(
            "requests", "Requests answered, by gRPC status; model is empty where it is not known.", "status"
        )
        self.item_failures = counter("item_failures", "Responses without a score, by code.", "code")
        self.rejections = counter("admission_rejections", "Requests refused before any work.", "reason")
        self.pairs = counter("pairs", "Prompt/response pairs scored.")
        self.tokens = counter("tokens", "Prompt and response tokens of the pairs scored.")
        self.prefix_cache_tokens = counter("prefix_cache_tokens", "Prompt tokens looked up, by result.", "result")
        self.restarts = counter("engine_restarts", "Times the engine process was restarted.")
        self.in_flight = gauge("in_flight_requests", "Requests admitted and not yet answered.")
        self.in_flight_tokens = gauge("in_flight_tokens", "Their tokens, prompts counted once per group.")
        self.queued_requests = gauge("queued_requests", "Requests waiting in the scheduler after the last batch.")
        self.queued_tokens = gauge("queued_tokens", "Their tokens.")
        self.up = gauge("model_up", "1 if the model can score, else 0; nothing of one that was unloaded.")
        self.info = gauge(
            "model_info", "1, with the version that is served.", "version", "architecture", "path", "dtype"
        )
        self.batch_tokens = histogram("batch_tokens", "Tokens computed in one forward.", _powers_of_two(4, 17))
        self.batch_pairs = histogram("batch_pairs", "Pairs scored in one forward.", _powers_of_two(0, 10))
        self.stage_seconds = histogram("stage_seconds", "Where a request's time went.", SECONDS, "stage")
        self.score = histogram("score", "Scores given out.", SCORES)
        self.response_tokens = histogram("response_tokens", "Tokens of the responses scored.", _powers_of_two(0, 15))
        self.truncated = counter("truncated_pairs", "Pairs scored of which something was cut off before.")
        self.group_std = histogram(
            "group_score_std", "Standard deviation of the scores of one prompt's responses, of two or more.", SPREADS
        )
        self.score_std = histogram(
            "score_std", "Uncertainty given with a score: an ensemble's spread, or the model's own.", SPREADS
        )
        # What a slope or a correlation is made of: sums of squares and of products of deviations from a group's mean.
        self.score_squares = counter("group_score_squares", "Squared deviations of scores from their group's mean.")
        self.length_squares = counter(
            "group_length_squares", "Squared deviations of responses' tokens from their group's mean."
        )
        self.products = gauge(
            "group_length_score_products",
            "Sum of both deviations' products: by rewardserve_group_length_squares_total, a score's slope per token.",
        )
        self.drift = gauge(
            "score_drift",
            "Population stability index of the last 2,000 scores against --drift-reference; NaN where it tells none.",
        )
        self._drifts: dict[str, Callable[[], float]] = {}
        # Prometheus has no sum for a histogram that goes below zero.
        self.score_sum = gauge("score_total", "Sum of the scores given out; over rewardserve_pairs_total, their mean.")

    def watch_drift(self, model: str, value: Callable[[], float]) -> None:
        """Asked when metrics are scraped, while a model of that name is served."""
        self._drifts[model] = value

    def bind_drift(self, model: str) -> None:
        if model in self._drifts:
            self.drift.labels(model).set_function(self._drifts[model])

    def unbind_drift(self, model: str) -> None:
        if model in self._drifts:
            self.drift.remove(model)

    def count_request_of_no_model(self, status: str) -> None:
        """One that could not be read, or names a model nobody serves."""
        self.requests.labels("", status).inc()


class ModelMetrics:
    """The series of one model, bound."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._info_labels: tuple[str, ...] | None = None
        self._requests_ok = metrics.requests.labels(model, "OK")
        self.pairs = metrics.pairs.labels(model)
        self.tokens = metrics.tokens.labels(model)
        self.cache_hits = metrics.prefix_cache_tokens.labels(model, "hit")
        self.cache_misses = metrics.prefix_cache_tokens.labels(model, "miss")
        self.restarts = metrics.restarts.labels(model)
        self.queued_requests = metrics.queued_requests.labels(model)
        self.queued_tokens = metrics.queued_tokens.labels(model)
        self.up = metrics.up.labels(model)
        self.batch_tokens = metrics.batch_tokens.labels(model)
        self.batch_pairs = metrics.batch_pairs.labels(model)
        self.stages = {stage: metrics.stage_seconds.labels(model, stage) for stage in STAGES}
        self.score = metrics.score.labels(model)
        self.score_sum = metrics.score_sum.labels(model)
        self.response_tokens = metrics.response_tokens.labels(model)
        self.truncated = metrics.truncated.labels(model)
        self.group_std = metrics.group_std.labels(model)
        self.score_std = metrics.score_std.labels(model)
        self.score_squares = metrics.score_squares.labels(model)
        self.length_squares = metrics.length_squares.labels(model)
        self.products = metrics.products.labels(model)
        metrics.bind_drift(model)

    def watch_in_flight(self, num_requests: Callable[[], float], num_tokens: Callable[[], float]) -> None:
        """Both are asked when metrics are scraped, and not written for each request."""
        self._metrics.in_flight.labels(self._model).set_function(num_requests)
        self._metrics.in_flight_tokens.labels(self._model).set_function(num_tokens)

    def count_request(self, status: str) -> None:
        ok = status == "OK"  # looking up labels takes longer than counting
        (self._requests_ok if ok else self._metrics.requests.labels(self._model, status)).inc()

    def count_item_failure(self, code: str) -> None:
        self._metrics.item_failures.labels(self._model, code).inc()

    def count_rejection(self, reason: str) -> None:
        self._metrics.rejections.labels(self._model, reason).inc()

    def set_info(self, version: str, architecture: str, path: str, dtype: str) -> None:
        """Replaces what was said before: one version is served at a time."""
        labels = (self._model, version, architecture, path, dtype)
        if self._info_labels not in (None, labels):
            self._metrics.info.remove(*self._info_labels)
        self._metrics.info.labels(*labels).set(1)
        self._info_labels = labels

    def nothing_queued(self) -> None:
        """The engine whose scheduler last said otherwise is not there any more."""
        self.queued_requests.set(0)
        self.queued_tokens.set(0)

    def forget(self) -> None:
        """The model is gone: what it did stays counted, and it is not one that is down and should be up."""
        of_now = (self._metrics.up, self._metrics.in_flight, self._metrics.in_flight_tokens)
        for gauge in (*of_now, self._metrics.queued_requests, self._metrics.queued_tokens):
            gauge.remove(self._model)
        self._metrics.unbind_drift(self._model)
        if self._info_labels is not None:
            self._metrics.info.remove(*self._info_labels)
            self._info_labels = None


def _powers_of_two(first: int, last: int) -> tuple[float, ...]:
    return tuple(float(2**exponent) for exponent in range(first, last + 1))
