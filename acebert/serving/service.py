"""One replica of the search service: a bundle in memory, kept up to date, swapped when a newer one
is published. Plain asyncio: Ray stands around it (`deployments`), HTTP before it (`api`).

Hot path: a query whose text, normalised as in training, is in the bundle's table has its vector
there; the index is searched at once. All others share forwards of the query encoder (`Batcher`).
Both kinds end in one thread pool, so that the event loop is free for health checks and refusals.

Swap: `_swap` loads the new bundle with its encoder and index beside the old, applies all changes
to it that were made since its catalogue was written, and then puts it in place at once. A request
keeps the bundle that it began with, which goes on following changes meanwhile.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from acebert.config import Settings
from acebert.data.schema import normalize_query
from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import (
    Action,
    Event,
    EventLog,
    Exposure,
    Shown,
    events_directory,
    tend,
    user_key,
)
from acebert.experiment.interleaving import team_draft
from acebert.serving.batcher import Batcher
from acebert.serving.bundle import Bundle, published
from acebert.serving.catalogue import LIMIT, Products, Unavailable
from acebert.serving.changes import Source
from acebert.serving.drift import QueryDrift
from acebert.serving.leases import EVERY_SECONDS, Lease
from acebert.serving.live_index import LiveIndex, LiveProducts, fuse, raised
from acebert.serving.metrics import Metrics
from acebert.serving.products import Change, Filter, Hit, Patch, Product
from acebert.serving.query_encoder import QueryEncoder, refuse_without_runtime
from acebert.serving.wanted import WantedBundle

log = logging.getLogger(__name__)

WARN_SECONDS = 60.0  # between two lines on a log that cannot be written
OF_A_BATCH = 32  # searches that the index does at a time, so that others get their turn
START_SECONDS = 60.0  # for one answer of the writer, before a replica starts without it
AWAY_SECONDS = 5.0  # most seconds between two attempts to hear of changes, whose writer is away
BACK_OFF = 60.0  # most seconds between two attempts to load a bundle that cannot be loaded
NO_ARM = ""  # of the metrics: the published bundle answered
Step = Callable[[], Awaitable[None]]
EncodeQueries = Callable[[Path, Sequence[str]], Awaitable[tuple[str, NDArray[np.float32]]]]
"""bundle, texts [n] → version of the model, vectors [n, d]: a query encoder elsewhere"""


@dataclass(frozen=True)
class How:
    """What a search does beside comparing vectors."""

    hybrid: bool = False
    """fuse the ranks with BM25's on titles"""
    clicks: bool = False
    """raise the scores of what was clicked for the very query before"""
    min_score: float | None = None
    """hits whose vectors score below are left out (none: `serve.good_score` only judges the
    best)"""


PLAIN = How()


@dataclass(frozen=True)
class Found:
    """Hits of one search."""

    hits: list[Hit]
    path: str
    """hot, tail, product or photo"""
    version: str
    """of the model"""
    encoder: str
    """of the query encoder"""
    no_good_match: bool
    seconds: float
    search_id: str | None = None
    """of an experiment's search"""
    arm: str | None = None
    """that answered it"""


class Loaded:
    """A bundle that can be searched: its index with changes up to `seq`, its encoder."""

    def __init__(self, directory: Path, settings: Settings, pool: ThreadPoolExecutor) -> None:
        """
        Raises:
            UserError: the bundle is broken, or its parts are of different models.
        """
        serve = settings.serve
        self.bundle = Bundle(directory)
        self.version = self.bundle.version
        self.seq = 0
        self.begun = False
        """the writer has said where to begin"""
        self.heard = time.monotonic()
        """when the writer last said what changed, or else when this was loaded"""
        self.applying = asyncio.Lock()
        self.drift = QueryDrift(self.bundle.query_mean)
        self.index: LiveProducts
        if serve.milvus_uri is None:
            self.index = LiveIndex(self.bundle)
        else:
            from acebert.serving.milvus import MilvusIndex

            self.index = MilvusIndex(self.bundle, serve.milvus_uri)
        self.batcher: Batcher | None = None
        if serve.encoder_apart:
            refuse_without_runtime(directory / "query_encoder", serve.runtime)
        else:
            encoder = QueryEncoder.load(
                directory / "query_encoder", serve.runtime, threads=serve.threads
            )
            check_version(encoder.version, self.version, directory)
            self.batcher = Batcher(
                encoder.encode, pool, serve.batch_size, serve.batch_wait_ms / 1000
            )

    @property
    def behind(self) -> float:
        """Seconds since the writer last said what changed."""
        return time.monotonic() - self.heard


def check_version(found: str, expected: str, where: object) -> None:
    """
    Raises:
        UserError: vectors of two models would be compared.
    """
    if found != expected:
        raise UserError(f"{where}: query encoder of model {found} beside vectors of {expected}")


class SearchService:
    """See the module's docstring.

    Args:
        settings: `serve` and `workdir` are read.
        products: the writer and the product encoder.
        encode: the query encoder, where `serve.encoder_apart`.
    """

    def __init__(
        self, settings: Settings, products: Products, encode: EncodeQueries | None = None
    ) -> None:
        self.settings = settings.serve
        self.all_settings = settings
        self.products = products
        self._encode_apart = encode
        self.metrics = Metrics()
        threads = self.settings.threads
        self._pool = ThreadPoolExecutor(  # FAISS counts its threads for each thread that calls it
            threads + 1, "search", faiss.omp_set_num_threads, (threads,)
        )
        # Of all matches of a frequent word SQLite sorts the scores: no search waits for that.
        self._word_pool = ThreadPoolExecutor(threads, "words")
        self._wanted = WantedBundle(settings)
        self._lease = Lease(settings.workdir)
        self._coming: set[Path] = set()
        self.loaded: Loaded | None = None
        self.refused: str | None = None
        """why what is published now is not taken over"""
        experiment = Experiment.of(settings.experiment)
        self.trial = Trial(experiment, self) if experiment else None
        self.loading = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the bundle, apply all changes to it, and follow both from then on. Without the
        writer it starts with the bundle alone, so that a replica can come back; changes follow.

        Raises:
            UserError: there is no bundle, or it is broken.
        """
        self.loaded = await self.load(await asyncio.to_thread(self._wanted), starts=True)
        often = self.settings.follow_seconds
        flush = self.all_settings.experiment.flush_seconds
        steps: list[tuple[Step, float, float]]
        steps = [(self._swap, often, BACK_OFF), (self._tell, often, often)]
        steps += [(self._hold, EVERY_SECONDS, EVERY_SECONDS), (self._tend_log, flush, BACK_OFF)]
        if self.trial is not None:
            await self.trial.start()
            steps += [(self.trial.flush, flush, BACK_OFF)]
            steps += [(swap, often, BACK_OFF) for swap in self.trial.swaps()]
        # One for each, so that an arm whose changes cannot be encoded holds up no other.
        steps += [(partial(self._follow, arm), often, AWAY_SECONDS) for arm in self._answering()]
        self._tasks = [asyncio.create_task(self._repeat(*step)) for step in steps]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.metrics.tell()
        if self.trial is not None:
            await asyncio.to_thread(self.trial.close)
        await asyncio.to_thread(self._lease.end)
        self._pool.shutdown(wait=False)
        self._word_pool.shutdown(wait=False)

    def current(self) -> Loaded:
        assert self.loaded is not None, "start() was not awaited"
        return self.loaded

    def _answering(self) -> dict[str, Loaded]:
        """The published bundle as NO_ARM, then those of an experiment's arms."""
        arms = self.trial.arms if self.trial is not None else {}
        return {**({NO_ARM: self.loaded} if self.loaded else {}), **arms}

    def all_loaded(self) -> list[Loaded]:
        """The published bundle first, then those of an experiment's arms, each once."""
        every = self._answering().values()
        return list({loaded.bundle.directory: loaded for loaded in every}.values())

    async def load(self, directory: Path, *, starts: bool = False) -> Loaded:
        """A bundle with all changes; where the service `starts` and the writer does not answer,
        with those that it has told. One that all users and an arm, or several arms, have is there
        once."""
        for loaded in self.all_loaded():
            if loaded.bundle.directory == directory:
                return loaded
        self._coming.add(directory)
        try:
            await self._hold()
            loaded = await self._load(directory, starts=starts)
            if self._encode_apart is not None and not starts:  # before the old one's place is taken
                await self._vector(loaded, "")
            return loaded
        finally:
            self._coming.discard(directory)

    async def _load(self, directory: Path, *, starts: bool) -> Loaded:
        loaded = await asyncio.to_thread(Loaded, directory, self.all_settings, self._pool)
        try:
            seconds = START_SECONDS if starts else None
            while await asyncio.wait_for(self.catch_up(loaded), seconds) == LIMIT:
                pass  # not until nothing comes any more: something always may
        except (Unavailable, TimeoutError) as error:
            if not starts:
                raise
            log.warning("starts without all changes, the writer does not answer: %r", error)
        log.info("serves %s, %d changes", directory, loaded.seq)
        return loaded

    async def catch_up(self, loaded: Loaded) -> int:
        """Apply the next changes; how many there were."""
        bundle, version = loaded.bundle.directory, loaded.version
        async with loaded.applying:  # an arm's bundle may be the published one
            if not loaded.begun:
                seq, gone = await self.products.begin(loaded.bundle.made.get("catalogue"))
                out = Patch(in_stock=False)
                carried = [Change(seq, name, None, None, out) for name in gone]
                await asyncio.to_thread(loaded.index.apply, carried)
                loaded.seq, loaded.begun = seq, True
            changes = await self.products.changes(loaded.seq, bundle, version)
            if changes:
                await asyncio.to_thread(loaded.index.apply, changes)
                loaded.seq = changes[-1].seq
                self.metrics.changes.inc(len(changes))
        loaded.heard = time.monotonic()
        return len(changes)

    async def _repeat(self, step: Step, seconds: float, most: float) -> None:
        """Take `step` every so many seconds; after one that failed wait twice as long as before
        it, up to `most`."""
        wait = seconds
        while True:
            await asyncio.sleep(wait)
            try:
                await step()
                wait = seconds
            except Exception as error:  # a bundle is broken, a part is away: serve what there is
                wait = max(seconds, min(2 * wait, most))
                known = isinstance(error, Unavailable | UserError)
                why = "goes on with what it has, tries again in %.1f s: %s"
                log.warning(why, wait, error, exc_info=not known)

    async def _follow(self, arm: str) -> None:
        """Take changes over into what answers for `arm`."""
        loaded = self._answering()[arm]
        while await self.catch_up(loaded) == LIMIT:
            pass

    async def _hold(self) -> None:
        """Say which bundles are in use here."""
        bundles = {loaded.bundle.directory for loaded in self.all_loaded()} | self._coming
        await asyncio.to_thread(self._lease.hold, bundles)

    async def _tend_log(self) -> None:
        """Move to Parquet what dead replicas left of an experiment's log, and delete what is too
        old: with no experiment too, for the log of the last one is still there."""
        days = self.all_settings.experiment.retention_days
        await asyncio.to_thread(tend, events_directory(self.all_settings.workdir), days)

    async def _swap(self) -> None:
        try:
            wanted = await asyncio.to_thread(self._wanted)
            if wanted != self.current().bundle.directory:
                async with self.loading:
                    self.loaded = await self.load(wanted)
            self.refused = None
        except UserError as error:
            self.refused = str(error)
            raise

    async def _tell(self) -> None:
        """Metrics of what is served, and of what waits."""
        for arm, loaded in self._answering().items():
            self.metrics.state(loaded.bundle, arm, loaded.drift.value, loaded.behind)
        batchers = [loaded.batcher for loaded in self.all_loaded()]
        self.metrics.waiting.set(sum(batcher.waiting for batcher in batchers if batcher))
        self.metrics.tell()

    async def search(
        self,
        query: str,
        k: int,
        where: Filter,
        how: How = PLAIN,
        arm: str = NO_ARM,
    ) -> Found:
        """The best k products for a query, by the bundle of the experiment's `arm` (none: by the
        published one)."""
        start = time.perf_counter()
        loaded = self.trial.arms[arm] if self.trial and arm else self.current()
        text = normalize_query(query)
        vector, path = await self._of_query(loaded, text)
        labels = {"path": path, "arm": arm}
        if path == "tail":
            self.metrics.stage("encode", labels, time.perf_counter() - start)
        return await self._nearest(loaded, vector, k, where, labels, start, how, text)

    async def search_many(self, queries: Sequence[str], k: int, where: Filter) -> list[Found]:
        """As many searches at once, of which the index does some at a time."""
        start = time.perf_counter()
        loaded = self.current()
        texts = [normalize_query(query) for query in queries]
        asked = await asyncio.gather(*(self._of_query(loaded, text) for text in texts))
        vectors = np.stack([vector for vector, _ in asked])
        encoded = time.perf_counter()
        hits: list[list[Hit]] = []
        loop = asyncio.get_running_loop()
        for first in range(0, len(vectors), OF_A_BATCH):
            some = vectors[first : first + OF_A_BATCH]
            hits += await loop.run_in_executor(self._pool, loaded.index.search, some, k, where)
        seconds = self._timed({"path": "batch", "arm": NO_ARM}, start, encoded)
        return [
            self._found(loaded, own, self._none_good([own], None), path, NO_ARM, seconds)
            for own, (_, path) in zip(hits, asked, strict=True)
        ]

    async def _of_query(self, loaded: Loaded, text: str) -> tuple[NDArray[np.float32], str]:
        """A normalised query's vector, and its path: hot or tail."""
        row = loaded.bundle.hot.get(text)
        if row is not None:
            vector = np.asarray(loaded.bundle.hot_vectors[row])
        else:
            vector = await self._vector(loaded, text)
        loaded.drift.add(vector)
        return vector, "tail" if row is None else "hot"

    async def similar(self, product_id: str, k: int, where: Filter) -> Found | None:
        """The products nearest to a product, without it, in the first bundle that has it, of those
        that are served; None: none has."""
        start = time.perf_counter()
        for loaded in self.all_loaded():
            vector = await asyncio.to_thread(loaded.index.vector, product_id)
            if vector is not None:
                break
        else:
            return None
        labels = {"path": "product", "arm": NO_ARM}
        found = await self._nearest(loaded, vector, k + 1, where, labels, start)
        others = [hit for hit in found.hits if hit.product.product_id != product_id][:k]
        return replace(found, hits=others, no_good_match=False)

    async def search_photo(self, photo: bytes, text: str, k: int, where: Filter) -> Found:
        """The products nearest to one that looks like `photo` and is called `text`.

        Raises:
            UserError: the model that is served reads no photos.
            BrokenImage: `photo` is none, or too large.
        """
        start = time.perf_counter()
        loaded = self.current()
        if not loaded.bundle.reads_photos:
            raise UserError("the model that is served reads no photos: search by text")
        shown = Source(Product("", text), photo)  # no product of the bundle
        vectors = await self.products.encode(loaded.bundle.directory, [shown])
        labels = {"path": "photo", "arm": NO_ARM}
        self.metrics.stage("encode", labels, time.perf_counter() - start)
        return await self._nearest(loaded, vectors[0], k, where, labels, start)

    async def photo(self, product_id: str) -> bytes | None:
        """JPEG of a product of any bundle that is served, or None."""
        for loaded in self.all_loaded():
            if loaded.index.is_changed(product_id):
                return await self.products.photo(product_id)
            photo = await asyncio.to_thread(loaded.bundle.photo_of, product_id)
            if photo is not None:
                return photo
        return None

    async def product(self, product_id: str) -> Product | None:
        """A product of any bundle that is served: an arm's may have more than the published one."""
        for loaded in self.all_loaded():
            product = await asyncio.to_thread(loaded.index.product, product_id)
            if product is not None:
                return product
        return None

    async def _vector(self, loaded: Loaded, text: str) -> NDArray[np.float32]:
        if loaded.batcher is not None:
            return await loaded.batcher(text)
        assert self._encode_apart is not None
        version, vectors = await self._encode_apart(loaded.bundle.directory, [text])
        try:
            check_version(version, loaded.version, loaded.bundle.directory)
        except UserError as error:
            log.warning("a search is refused: %s", error)
            raise Unavailable("the query encoder is of another model: try again") from error
        return vectors[0]

    async def _nearest(
        self,
        loaded: Loaded,
        vector: NDArray[np.float32],
        k: int,
        where: Filter,
        labels: dict[str, str],
        start: float,
        how: How = PLAIN,
        text: str = "",
    ) -> Found:
        """As `how` says; `text` is the normalised query that `vector` is of."""
        loop = asyncio.get_running_loop()
        asked = time.perf_counter()
        (hits,) = await loop.run_in_executor(
            self._pool, loaded.index.search, vector[None], k, where
        )
        rankings = [hits]
        clicked: dict[str, int] = {}
        if how.clicks:
            find = partial(_clicked, loaded, text, vector, where)
            clicked, others = await loop.run_in_executor(self._pool, find)
            rankings[0] = hits + others
        if how.hybrid:
            by_words = partial(loaded.index.by_words, text, vector, k, where)
            rankings.append(await loop.run_in_executor(self._word_pool, by_words))
        no_good_match = self._none_good(rankings, how.min_score)
        if how.min_score is not None:
            rankings = [[hit for hit in some if hit.score >= how.min_score] for some in rankings]
        if clicked:
            rankings[0] = raised(k, rankings[0], clicked, self.settings.click_weight)
        hits = fuse(k, *rankings) if how.hybrid else rankings[0]
        seconds = self._timed(labels, start, asked)
        return self._found(loaded, hits, no_good_match, labels["path"], labels["arm"], seconds)

    def _none_good(self, rankings: Sequence[list[Hit]], min_score: float | None) -> bool:
        scores = [hit.score for ranking in rankings for hit in ranking]
        good = self.settings.good_score if min_score is None else min_score
        return not scores or (good is not None and max(scores) < good)

    def _timed(self, labels: dict[str, str], start: float, asked: float) -> float:
        """Seconds from `start` until now, of which those from `asked` on were in the index."""
        end = time.perf_counter()
        self.metrics.stage("index", labels, end - asked)
        self.metrics.stage("total", labels, end - start)
        return end - start

    def _found(
        self,
        loaded: Loaded,
        hits: list[Hit],
        no_good_match: bool,
        path: str,
        arm: str,
        seconds: float,
    ) -> Found:
        """Hits as an answer, counted."""
        self.metrics.queries.inc(path, arm)
        encoder = loaded.bundle.encoder
        return Found(hits, path, loaded.version, encoder, no_good_match, seconds)


def _clicked(
    loaded: Loaded, text: str, vector: NDArray[np.float32], where: Filter
) -> tuple[dict[str, int], list[Hit]]:
    """What was clicked for a normalised query, and the hits among it by the score of its vector."""
    clicked = loaded.bundle.clicked(text)
    return clicked, loaded.index.by_ids(list(clicked), vector, where) if clicked else []


def _made_by(found: Found) -> str:
    """Which model answered, and by which query encoder, as it is logged."""
    return f"{found.version} {found.encoder}"


class Trial:
    """The experiment of a service: arms beside the published bundle, and the log.

    A search has an id when it is in the log, so no answer with an id is missing there. Where the
    log cannot be written, as on a full disk, shoppers get their answers all the same, without an
    id, and events are refused.
    """

    def __init__(self, experiment: Experiment, service: SearchService) -> None:
        self._experiment, self._service = experiment, service
        settings = service.all_settings
        self._workdir = settings.workdir
        self._directory = events_directory(settings.workdir)
        self._log_queries = settings.experiment.log_queries
        self.arms: dict[str, Loaded] = {}
        """what answers for each"""
        self._log: EventLog | None = None
        self._warned = -WARN_SECONDS

    async def start(self) -> None:
        """Load what is published for each arm.

        Raises:
            UserError: nothing is published for an arm, or a bundle is broken.
        """
        for arm in self._experiment.arms:
            self.arms[arm] = await self._service.load(published(self._workdir, arm), starts=True)

    def _logged(self, event: Callable[[], Event]) -> bool:
        """Whether an event is in the log, durably. On the event loop: a write
        to the page cache is not worth a thread's turn."""
        try:
            if self._log is None:
                self._log = EventLog(self._directory)
            self._log.append([event()])
        except OSError as error:
            self._service.metrics.not_logged.inc()
            if time.monotonic() - self._warned >= WARN_SECONDS:
                self._warned = time.monotonic()
                log.warning("%s: searches and events are not logged: %s", self._directory, error)
            return False
        return True

    def _log_event(self, event: Callable[[], Event]) -> None:
        """
        Raises:
            Unavailable: the log cannot be written.
        """
        if not self._logged(event):
            raise Unavailable("the log of events cannot be written: try again")

    def swaps(self) -> list[Step]:
        """For each arm, what takes over a newer bundle."""
        return [partial(self._swap, arm) for arm in self.arms]

    async def _swap(self, arm: str) -> None:
        wanted = published(self._workdir, arm)
        if wanted != self.arms[arm].bundle.directory:
            async with self._service.loading:
                self.arms[arm] = await self._service.load(wanted)

    async def flush(self) -> None:
        """Move this replica's part of the log to Parquet."""
        if self._log is not None:
            await asyncio.to_thread(self._log.flush)

    def close(self) -> None:
        try:
            if self._log is not None:
                self._log.flush()
        except OSError as error:
            log.warning("%s: the next replica moves what is left there: %s", self._directory, error)

    async def search(
        self,
        user: str,
        search_id: str | None,
        query: str,
        k: int,
        where: Filter,
        how: How,
    ) -> Found:
        """The best k products by the user's arm, or a draft of both arms; logged, or without a
        search id. In a draft a product stays by the score of the arm whose ranking it is taken
        from: scores of two models have no common scale."""
        experiment = self._experiment

        async def by(arm: str) -> Found:
            return await self._service.search(query, k, where, how, arm)

        arm, teams = None, None
        if experiment.design == "interleave":
            both = await asyncio.gather(*(by(arm) for arm in experiment.arms))
            first, second = ([hit.product.product_id for hit in found.hits] for found in both)
            versions = {arm: _made_by(of) for arm, of in zip(experiment.arms, both, strict=True)}
            seed = experiment.seed("draft", user, normalize_query(query))
            picks = team_draft(first, second, k, seed)
            teams = [None if pick.team is None else experiment.arms[pick.team] for pick in picks]
            found = replace(
                both[0],
                hits=[both[pick.ranking].hits[pick.row] for pick in picks],
                no_good_match=all(one.no_good_match for one in both),
                seconds=max(one.seconds for one in both),
            )
        else:
            arm = experiment.arm(user)
            found = await by(arm)
            versions = {arm: _made_by(found)}
        name = search_id or secrets.token_hex(16)
        products = [hit.product.product_id for hit in found.hits]
        design = experiment.design
        start = time.perf_counter()
        logged = self._logged(
            lambda: self._exposure(name, design, arm, user, query, products, teams, versions)
        )
        labels = {"path": found.path, "arm": arm or NO_ARM}
        self._service.metrics.stage("log", labels, time.perf_counter() - start)
        return replace(found, search_id=name, arm=arm) if logged else found

    def _exposure(
        self,
        search_id: str,
        design: Shown,
        arm: str | None,
        user: str,
        query: str,
        products: list[str],
        teams: Sequence[str | None] | None,
        versions: dict[str, str],
    ) -> Exposure:
        """
        Raises:
            OSError: the log has no salt yet, and none can be written.
        """
        return Exposure(
            search_id,
            datetime.now(UTC),
            self._experiment.name,
            arm,
            user_key(self._directory, user),
            normalize_query(query) if self._log_queries else "",
            products,
            self._experiment.dealing,
            design,
            versions,
            teams,
        )

    async def compare(
        self, user: str, query: str, k: int, where: Filter
    ) -> tuple[str, list[Hit], list[Hit]]:
        """A search's id, and the answers of two arms, on sides that the id decides; logged.

        Raises:
            Unavailable: the log cannot be written.
        """
        search_id = secrets.token_hex(16)
        sides = self._experiment.sides(search_id)
        left, right = await asyncio.gather(
            *(self._service.search(query, k, where, arm=arm) for arm in sides)
        )
        products = [hit.product.product_id for hit in [*left.hits, *right.hits]]
        teams = [sides[0]] * len(left.hits) + [sides[1]] * len(right.hits)
        versions = {arm: _made_by(of) for arm, of in zip(sides, (left, right), strict=True)}
        self._log_event(
            lambda: self._exposure(
                search_id, "compare", None, user, query, products, teams, versions
            )
        )
        return search_id, left.hits, right.hits

    def vote(self, search_id: str, better: str) -> None:
        """Log which side of a comparison was better: left, right or neither.

        Raises:
            Unavailable: the log cannot be written.
        """
        left, right = self._experiment.sides(search_id)
        won = {"left": left, "right": right, "neither": ""}[better]
        self._log_event(lambda: Action(search_id, datetime.now(UTC), "vote", won))

    async def act(
        self, search_id: str, action: str, product_id: str, revenue: float | None
    ) -> None:
        """Log what a shopper did; a kill of this process after it returns loses nothing.

        Raises:
            Unavailable: the log cannot be written.
        """
        if action == "purchase" and revenue is None:
            product = await self._service.product(product_id)
            revenue = product.price if product else None
        self._log_event(lambda: Action(search_id, datetime.now(UTC), action, product_id, revenue))
