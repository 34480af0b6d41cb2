"""Counts and times of the service, as Ray exports them to Prometheus.

Told to Ray one by one, what a search counts costs 14 % of the hot searches a second
(docs/results.md, 'Logging and metrics'), so it is summed here and told each `follow_seconds`.

`acebert_queries` by `path` (hot, tail, product, photo), so the hit rate is hot over hot + tail;
`acebert_stage_ms_bucket` (at most `le` ms) and `acebert_stage_ms_sum` by `stage` (encode; index,
with the wait for a thread; total, of both; log, the wait of an experiment's search for its log,
after that) and `path` (batch too: its searches are timed together), a histogram in two counters;
`acebert_answers` by `status`, of all requests but probes; `acebert_refused` by `status`, of those
refused before any route; `acebert_changes_applied`; of the published bundle and of each arm
`acebert_behind_s`, how long ago a replica last heard of changes for it, `acebert_products`, and
`acebert_age_s` by `part` (bundle, catalogue, hot_lists, model); of a replica,
`acebert_queries_waiting` for the query encoder, and `acebert_query_drift` (`drift`); of an
experiment, `acebert_not_logged`, searches and events that the log did not take.
"""

from bisect import bisect_left
from collections import defaultdict
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    from acebert.serving.bundle import Bundle

BOUNDARIES = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
LE = [*map(str, BOUNDARIES), "+Inf"]


class Sums:
    """A counter of Ray's that is told of many events at once. Not for several threads."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        self._counter, self._labels = Counter(name, description, labels), labels
        self._sums: dict[tuple[str, ...], float] = defaultdict(float)

    def inc(self, *labels: str, by: float = 1) -> None:
        self._sums[labels] += by

    def tell(self) -> None:
        sums, self._sums = self._sums, defaultdict(float)
        for labels, value in sums.items():
            self._counter.inc(value, dict(zip(self._labels, labels, strict=True)))


class Times:
    """A histogram [ms], likewise."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        self._bucket = Sums(f"{name}_bucket", f"{description}, at most le", (*labels, "le"))
        self._sum = Sums(f"{name}_sum", f"{description}, all together", labels)
        self._counts: dict[tuple[str, ...], list[int]] = {}

    def observe(self, *labels: str, ms: float) -> None:
        if labels not in self._counts:
            self._counts[labels] = [0] * len(LE)
        self._counts[labels][bisect_left(BOUNDARIES, ms)] += 1
        self._sum.inc(*labels, by=max(1e-6, ms))

    def tell(self) -> None:
        for labels, counts in self._counts.items():
            for le, count in zip(LE, accumulate(counts), strict=True):
                if count:
                    self._bucket.inc(*labels, le, by=count)
        self._counts.clear()
        self._bucket.tell()
        self._sum.tell()


class Metrics:
    def __init__(self) -> None:
        self.queries = Sums("acebert_queries", "searches", ("path", "arm"))
        self.stage_ms = Times("acebert_stage_ms", "time by stage [ms]", ("stage", "path", "arm"))
        self.answers = Sums("acebert_answers", "requests answered", ("status",))
        self.refused = Sums("acebert_refused", "requests refused", ("status",))
        self.changes = Counter("acebert_changes_applied", "changes of products applied")
        self.not_logged = Counter("acebert_not_logged", "searches and events that were not logged")
        self.behind = Gauge("acebert_behind_s", "since changes were last heard of [s]", ("arm",))
        self.products = Gauge("acebert_products", "products of the bundle", ("arm",))
        self.waiting = Gauge("acebert_queries_waiting", "queries that wait for the encoder")
        self.drift = Gauge(
            "acebert_query_drift", "cosine distance of live queries from the log's", ("arm",)
        )
        self.age = Gauge(
            "acebert_age_s", "since a part of the bundle was current [s]", ("part", "arm")
        )

    def stage(self, stage: str, labels: dict[str, str], seconds: float) -> None:
        """`labels`: path and arm."""
        self.stage_ms.observe(stage, labels["path"], labels["arm"], ms=1000 * seconds)

    def tell(self) -> None:
        """Hand on what was summed."""
        for sums in (self.queries, self.stage_ms, self.answers, self.refused):
            sums.tell()

    def state(self, bundle: "Bundle", arm: str, drift: float | None, behind: float) -> None:
        """What is served, how old it is by now, and how far behind the writer."""
        self.products.set(bundle.info["products"], {"arm": arm})
        self.behind.set(behind, {"arm": arm})
        now = datetime.now(UTC)
        for part, made in bundle.made.items():
            self.age.set(max(0.0, (now - made).total_seconds()), {"part": part, "arm": arm})
        if drift is not None:
            self.drift.set(drift, {"arm": arm})
