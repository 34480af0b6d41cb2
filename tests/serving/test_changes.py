"""The change log against a plain dict, and against kill -9."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acebert.errors import UserError
from acebert.serving import changes as module
from acebert.serving.catalogue import TOGETHER, Catalogue
from acebert.serving.changes import ChangeLog, Source
from acebert.serving.products import Change, Patch, Product


def source(name: str, title: str = "shoe", photo: bytes | None = None) -> Source:
    return Source(Product(name, title, "shoes", 9.5, in_stock=True), photo)


def vector(value: float) -> np.ndarray:
    return np.full((1, 4), value, np.float32)


@pytest.fixture
def log(tmp_path: Path) -> ChangeLog:
    return ChangeLog(tmp_path / "changes.sqlite")


operations = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 99) | st.none()), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=30)
@given(operations, st.integers(1, 5), st.integers(0, 30))
def test_a_follower_that_joins_at_any_time_ends_with_what_a_dict_holds(
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[str, int | None]],
    limit: int,
    join: int,
) -> None:
    log = ChangeLog(tmp_path_factory.mktemp("log") / "changes.sqlite")
    truth: dict[str, str] = {}
    seen: dict[str, str] = {}
    at = 0

    def follow() -> int:
        last = at
        while found := log.since(last, "v", limit):
            for change in found:
                seen.pop(change.product_id, None)
                if change.product is not None:
                    seen[change.product_id] = change.product.title
                last = change.seq
        return last

    for i, (name, value) in enumerate(operations):
        if value is None:
            log.delete(name)
            truth.pop(name, None)
        else:
            log.put([source(name, str(value))], vector(value), "v")
            truth[name] = str(value)
        if i == join:
            at = follow()
    follow()
    log.close()
    assert seen == truth


def test_vectors_of_another_version_are_never_handed_out(log: ChangeLog) -> None:
    log.put([source("a"), source("b")], np.ones((2, 4), np.float32), "old")
    assert log.since(0, "new", 10) == []
    lacking = log.lacking(0, "new", 10)
    assert [s.product.product_id for _, s in lacking] == ["a", "b"]
    log.add_vectors([lacking[0][0]], vector(2), "new")
    (first,) = log.since(0, "new", 10)
    assert first.product_id == "a"
    assert first.vector is not None
    np.testing.assert_array_equal(first.vector, vector(2)[0])
    assert len(log.since(0, "old", 10)) == 2


def test_a_change_behind_one_without_a_vector_waits_for_it(log: ChangeLog) -> None:
    log.put([source("a")], vector(1), "old")
    log.put([source("b")], vector(1), "new")
    assert log.since(0, "new", 10) == []


def test_a_vector_for_a_product_that_changed_meanwhile_is_dropped(log: ChangeLog) -> None:
    log.put([source("a", "old title")], vector(1), "old")
    ((seq, _),) = log.lacking(0, "new", 10)
    log.put([source("a", "new title")], vector(1), "old")
    log.add_vectors([seq], vector(5), "new")
    ((_, lacks),) = log.lacking(0, "new", 10)
    assert lacks.product.title == "new title"


def test_a_photo_is_kept_until_the_product_is_deleted(log: ChangeLog) -> None:
    log.put([source("a", photo=b"jpeg")], vector(1), "v")
    assert log.photo("a") == b"jpeg"
    log.delete("a")
    assert log.photo("a") is None
    assert log.photo("unknown") is None


def test_price_and_stock_are_changes_of_their_own_until_the_product_is_put_again(
    log: ChangeLog,
) -> None:
    log.put([source("a")], vector(1), "v")
    log.patch("a", Patch(price=2.0, in_stock=False))
    log.patch("a", Patch(price=3.0))
    log.patch("b", Patch(in_stock=True))
    found = log.since(0, "v", 10)
    assert [(c.product_id, c.patch) for c in found] == [
        ("a", None),
        ("a", Patch(in_stock=False)),
        ("a", Patch(price=3.0)),
        ("b", Patch(in_stock=True)),
    ]
    log.put([source("a")], vector(1), "v")
    log.delete("b")
    assert [(c.product_id, c.patch) for c in log.since(0, "v", 10)] == [("a", None), ("b", None)]


def test_what_is_out_of_stock_is_told_by_the_last_that_was_said_of_stock(log: ChangeLog) -> None:
    gone = {"in_stock": False}
    out = Source(Product("put", "shoe", **gone), None)
    log.put([out, Source(Product("put and back", "shoe", **gone), None)], np.eye(2, 4), "v")
    for name in ("patched", "back", "deleted"):
        log.patch(name, Patch(**gone))
    log.delete("deleted")
    before = log.patch("patched", Patch(price=2.0))
    for name in ("back", "put and back"):
        log.patch(name, Patch(in_stock=True))
    log.patch("later", Patch(**gone))
    assert log.out_of_stock(before) == ["put", "patched"]


def test_a_second_writer_is_refused(
    log: ChangeLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.put([source("a")], vector(1), "v")
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"changes\.sqlite.*locked"):
        ChangeLog(tmp_path / "changes.sqlite")


def test_changes_before_a_moment_are_those_made_before_it(log: ChangeLog) -> None:
    assert log.before(datetime.now(UTC)) == 0
    log.put([source("a")], vector(1), "v")
    first = log.delete("b")
    time.sleep(0.01)
    moment = datetime.now(UTC)
    time.sleep(0.01)
    last = log.put([source("c")], vector(1), "v")
    assert log.before(moment) == first
    assert log.before(datetime.now(UTC)) == last


def test_a_new_model_encodes_no_superseded_change_and_each_other_one_once_for_all_replicas(
    log: ChangeLog,
) -> None:
    encoded: list[str] = []

    async def encode(bundle: Path, sources: Sequence[Source]) -> np.ndarray:
        encoded.extend(source.product.title for source in sources)
        await asyncio.sleep(0.01)
        return np.ones((len(sources), 4), np.float32)

    superseded = log.put([source("a", "superseded")], vector(1), "old")
    for title in ("first", "second", "last"):
        log.put([source("b", title)], vector(1), "old")
    catalogue = Catalogue(log, encode, lambda: (Path(), "old"), 1.0)

    async def replicas() -> list[list[Change]]:
        asked = (catalogue.changes(superseded, Path(), "new") for _ in range(3))
        return await asyncio.gather(*asked)

    for found in asyncio.run(replicas()):
        assert [change.product_id for change in found] == ["b"]
    assert encoded == ["last"]


def test_a_photo_that_comes_while_a_put_without_one_is_encoded_stays(log: ChangeLog) -> None:
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    bundle = Bundles()
    order: list[bool] = []

    async def encode(bundle: Path, sources: Sequence[Source]) -> np.ndarray:
        order.append(sources[0].photo is not None)
        await asyncio.sleep(0.05 if sources[0].photo is None else 0)
        return np.ones((len(sources), 4), np.float32)

    catalogue = Catalogue(log, encode, lambda: (Path(), "v"), 1.0)
    catalogue._table = lambda path: bundle  # type: ignore[assignment]

    async def both() -> None:
        await catalogue.put([source("a")])
        first = asyncio.create_task(catalogue.put([source("a", "without")]))
        await asyncio.sleep(0.01)
        await catalogue.put([source("a", "with", picture), source("b")])
        await first

    asyncio.run(both())
    assert order == [False, False, True]
    assert log.photo("a") is not None
    assert not catalogue._busy


@pytest.mark.parametrize("method", ["put", "patch", "delete"])
def test_a_change_that_is_cancelled_while_it_is_written_undoes_no_later_one(
    log: ChangeLog, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    log.put([source("a")], vector(1), "v")
    writing, may_write = threading.Event(), threading.Event()

    async def encode(bundle: Path, sources: Sequence[Source]) -> np.ndarray:
        return np.ones((len(sources), 4), np.float32)

    catalogue = Catalogue(log, encode, lambda: (Path(), "v"), 1.0)
    catalogue._table = lambda path: Bundles()  # type: ignore[assignment]
    change: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "put": lambda: catalogue.put([source("a", "first")]),
        "patch": lambda: catalogue.patch("a", Patch(price=1.0)),
        "delete": lambda: catalogue.delete("a"),
    }
    write = getattr(log, method)

    def late(*arguments: Any) -> int:
        writing.set()
        may_write.wait(60)
        return write(*arguments)

    async def run() -> None:
        monkeypatch.setattr(log, method, late)
        first = asyncio.create_task(change[method]())
        await asyncio.to_thread(writing.wait, 60)
        monkeypatch.setattr(log, method, write)
        first.cancel()
        second = asyncio.create_task(catalogue.put([source("a", "second")]))
        await asyncio.wait([second], timeout=0.3)
        may_write.set()
        await second
        await asyncio.wait([first])

    asyncio.run(run())
    (change_of_a,) = log.since(0, "v", 10)
    assert change_of_a.product is not None
    assert (change_of_a.product.title, change_of_a.product.price) == ("second", 9.5)


def test_a_product_that_nobody_knows_is_deleted_from_the_bundle_that_is_to_come(
    log: ChangeLog,
) -> None:
    async def encode(bundle: Path, sources: Sequence[Source]) -> np.ndarray:
        raise AssertionError("a deletion needs no vector")

    catalogue = Catalogue(log, encode, lambda: (Path(), "v"), 1.0)
    written = datetime.now(UTC)  # a catalogue with the product, of which no bundle is made yet
    time.sleep(0.01)
    asyncio.run(catalogue.delete("of the new catalogue"))
    seq, _ = asyncio.run(catalogue.begin(written))
    (change,) = asyncio.run(catalogue.changes(seq, Path(), "v"))
    assert (change.product_id, change.product, change.patch) == ("of the new catalogue", None, None)


class Bundles:
    """A bundle's table without the product."""

    made: ClassVar[dict[str, datetime]] = {}

    def photo_of(self, product_id: str) -> None:
        return None


def test_many_products_without_vectors_are_encoded_a_few_at_a_time(log: ChangeLog) -> None:
    sizes: list[int] = []

    async def encode(bundle: Path, sources: Sequence[Source]) -> np.ndarray:
        sizes.append(len(sources))
        return np.ones((len(sources), 4), np.float32)

    n = 2 * TOGETHER + 5
    log.put([source(str(i)) for i in range(n)], np.ones((n, 4), np.float32), "old")
    catalogue = Catalogue(log, encode, lambda: (Path(), "old"), 1.0)
    found = asyncio.run(catalogue.changes(0, Path(), "new"))
    assert [change.product_id for change in found] == [str(i) for i in range(n)]
    assert sizes == [TOGETHER, TOGETHER, 5]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from acebert.serving.changes import ChangeLog, Source
from acebert.serving.products import Product
log = ChangeLog(Path(sys.argv[1]))
for i in range(int(sys.argv[2]), 1_000_000):
    name = f"p{i % 50}"
    log.put([Source(Product(name, str(i)), None)], np.full((1, 4), i, np.float32), "v")
    print(name, i, flush=True)
"""


def test_what_was_acknowledged_is_there_after_each_of_several_kill_9(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "changes.sqlite", dict[str, int]()
    for start, upserts in ((0, 120), (100_000, 7), (200_000, 31)):
        acknowledged |= acknowledged_before_kill_9(path, start, upserts)
        log = ChangeLog(path)
        found = {c.product_id: c for c in log.since(0, "v", 1000)}
        log.close()
        assert set(acknowledged) == set(found)
        for name, value in acknowledged.items():
            change = found[name]
            assert change.product is not None
            assert change.vector is not None
            assert int(change.product.title) >= value
            assert change.vector[0] == float(change.product.title)


def acknowledged_before_kill_9(path: Path, start: int, upserts: int) -> dict[str, int]:
    """Products and their last values that a process, killed after so many upserts, said it had."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(start)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged: dict[str, int] = {}
    for _ in range(upserts):
        name, value = process.stdout.readline().split()
        acknowledged[name] = int(value)
    os.kill(process.pid, signal.SIGKILL)
    for line in process.stdout:  # what it said before it died
        if line.endswith("\n"):
            name, value = line.split()
            acknowledged[name] = int(value)
    process.wait()
    return acknowledged
