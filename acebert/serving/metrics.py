"""Counts and times of the service, as Ray exports them to Prometheus.

`acebert_queries` by `path` (hot, tail, product, photo), so the hit rate is hot over hot + tail;
`acebert_stage_ms` by `stage` (encode; index, with the wait for a thread; total, of both; log, the
wait of an experiment's search for its log, after that) and `path`; `acebert_answers` by `status`,
of all requests but probes; `acebert_refused` by `status`, of those refused before any route;
`acebert_changes_applied`; of the published bundle and of each arm `acebert_behind_s`, how long ago
a replica last heard of changes for it, `acebert_products`, and `acebert_age_s` by `part` (bundle,
catalogue, hot_lists, model); of a replica, `acebert_queries_waiting` for the query encoder, and
`acebert_query_drift` (`drift`); of an experiment, `acebert_not_logged`, searches and events that
the log did not take.
"""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from acebert.serving.bundle import Bundle

BOUNDARIES = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]


class Metrics:
    def __init__(self) -> None:
        self.queries = Counter("acebert_queries", "searches", ("path", "arm"))
        self.stage_ms = Histogram(
            "acebert_stage_ms", "time by stage [ms]", BOUNDARIES, ("stage", "path", "arm")
        )
        self.answers = Counter("acebert_answers", "requests answered", ("status",))
        self.refused = Counter("acebert_refused", "requests refused", ("status",))
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
        self.stage_ms.observe(max(1e-6, 1000 * seconds), {"stage": stage, **labels})

    def state(self, bundle: "Bundle", arm: str, drift: float | None, behind: float) -> None:
        """What is served, how old it is by now, and how far behind the writer."""
        self.products.set(bundle.info["products"], {"arm": arm})
        self.behind.set(behind, {"arm": arm})
        now = datetime.now(UTC)
        for part, made in bundle.made.items():
            self.age.set(max(0.0, (now - made).total_seconds()), {"part": part, "arm": arm})
        if drift is not None:
            self.drift.set(drift, {"arm": arm})
