"""The API, over ASGI in this process, against the vectors of the embed stage and numpy."""

import asyncio
import base64
import io
import json
import shutil
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import faiss
import httpx2 as httpx
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from untrained import save_untrained

from acebert.data.tokens import load_tokenizer
from acebert.errors import UserError
from acebert.index import ProductIndex
from acebert.models.dual import DualEncoder
from acebert.serving import bundle as bundle_module
from acebert.serving import service
from acebert.serving.bundle import Bundle, ProductTable, build_bundle, publish, published
from acebert.serving.catalogue import Catalogue, Unavailable
from acebert.serving.changes import Source
from acebert.serving.gate import Gate
from acebert.serving.product_encoder import ProductEncoder
from acebert.serving.products import Filter, Product
from acebert.serving.query_encoder import QueryEncoder, product_side_version
from acebert.serving.service import Loaded
from acebert.workdir import Stage


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    for _ in range(int(seconds / 0.05)):
        if await condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come true in time")


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [hit["product_id"] for hit in answer.json()["hits"]]


def jpeg(colour: tuple[int, int, int] = (200, 30, 30), side: int = 64) -> str:
    pixels = np.full((side, side, 3), colour, np.uint8)
    return base64.b64encode(cv2.imencode(".jpg", pixels)[1].tobytes()).decode()


def assert_best(world: Any, hits: list[dict[str, Any]], vector: np.ndarray, k: int) -> None:
    """The hits are numpy's best k, in order; products of the same text score the same."""
    scores = dict(zip(world.ids, (world.vectors @ vector).tolist(), strict=True))
    expected = sorted(scores.values(), reverse=True)[:k]
    np.testing.assert_allclose([hit["score"] for hit in hits], expected, atol=1e-5)
    np.testing.assert_allclose([scores[hit["product_id"]] for hit in hits], expected, atol=1e-5)
    assert len({hit["product_id"] for hit in hits}) == len(hits)


def test_hot_and_tail_queries_find_numpys_best_100_and_say_which_they_were(
    world, with_service
) -> None:
    encoder = QueryEncoder.load(world.model)

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        hot = next(iter(local.service.current().bundle.hot))
        for query, path in [(hot, "hot"), (f"  {hot.upper()} ", "hot"), ("purple zebra", "tail")]:
            answer = await client.get("/search", params={"q": query, "k": 100})
            assert_best(world, answer.json()["hits"], encoder.encode([query])[0], 100)
            assert answer.json()["path"] == path
            assert answer.json()["version"] == encoder.version

    with_service(test)


def test_a_batch_answers_as_single_searches_do(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        queries = ["red shoe", "blue bag", "hat", "red shoe"]
        batch = await client.post("/search/batch", json={"queries": queries, "k": 7})
        for query, answer in zip(queries, batch.json()["answers"], strict=True):
            single = await client.get("/search", params={"q": query, "k": 7})
            assert [hit["product_id"] for hit in answer["hits"]] == ids(single)

    with_service(test)


def test_a_large_batch_is_jobs_of_the_index_one_after_another_with_the_answers_of_single_searches(
    world, with_service, monkeypatch
) -> None:
    encoder = QueryEncoder.load(world.model)
    jobs: list[int] = []
    running, most = 0, 0

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        loaded = local.service.current()
        search = loaded.index.search

        def noted(queries: np.ndarray, *arguments: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            jobs.append(len(queries))
            found = search(queries, *arguments)
            running -= 1
            return found

        monkeypatch.setattr(loaded.index, "search", noted)
        queries = [*loaded.bundle.hot, *(f"shoe number {i}" for i in range(50))]
        batch = await client.post("/search/batch", json={"queries": queries, "k": 20})
        n, most_a_job = len(queries), service.OF_A_BATCH
        assert jobs == [*n // most_a_job * [most_a_job], n % most_a_job]
        assert most == 1
        vectors = encoder.encode(queries)
        for query, vector, answer in zip(queries, vectors, batch.json()["answers"], strict=True):
            assert_best(world, answer["hits"], vector, 20)
            assert answer["path"] == ("hot" if query in loaded.bundle.hot else "tail")
        of_none = {"queries": ["shoe"], "filter": {"category": "there is none"}}
        (none,) = (await client.post("/search/batch", json=of_none)).json()["answers"]
        assert (none["hits"], none["no_good_match"]) == ([], True)

    with_service(test)


def test_searches_do_not_wait_for_the_words_of_hybrid_ones(
    world, with_service, monkeypatch
) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        index, may_end = local.service.current().index, threading.Event()
        by_words = index.by_words

        def slow(*arguments: Any) -> Any:
            assert may_end.wait(60)
            return by_words(*arguments)

        monkeypatch.setattr(index, "by_words", slow)
        asked = [
            asyncio.create_task(client.get("/search?q=shoe&hybrid=true"))
            for _ in range(local.service.settings.threads + 3)
        ]
        try:
            await asyncio.wait(asked, timeout=0.2)
            plain = await asyncio.wait_for(client.get("/search?q=shoe"), 30)
        finally:
            may_end.set()
        assert len(ids(plain)) == 10
        assert all([ids(await answer) for answer in asked])

    with_service(test)


def test_filters_and_the_score_threshold_hold_for_every_hit(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        category = (await client.get("/categories")).json()["categories"][0]
        found = await client.get("/search", params={"q": "shoe", "k": 80, "category": category})
        assert ids(found)
        assert {hit["category"] for hit in found.json()["hits"]} == {category}
        scores = [hit["score"] for hit in (await client.get("/search?q=shoe&k=80")).json()["hits"]]
        middle = scores[40] - 2e-6  # scores are rounded in answers
        above = await client.get("/search", params={"q": "shoe", "k": 80, "min_score": middle})
        assert len(ids(above)) == sum(score >= middle for score in scores)
        assert not above.json()["no_good_match"]
        none = await client.get("/search", params={"q": "shoe", "min_score": 1})
        assert ids(none) == []
        assert none.json()["no_good_match"]

    with_service(test)


def test_hybrid_hits_are_judged_by_their_vectors_too(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        hit = (await client.get("/search?q=shoe&k=80")).json()["hits"][40]
        asked = {"q": hit["title"], "k": 80, "hybrid": True}
        whole = {
            h["product_id"]: h["score"]
            for h in (await client.get("/search", params=asked | {"hybrid": False})).json()["hits"]
        }
        middle = sorted(whole.values())[40] - 2e-6  # scores are rounded in answers
        above = await client.get("/search", params=asked | {"min_score": middle})
        assert {*ids(above)} == {name for name, score in whole.items() if score >= middle}
        none = await client.get("/search", params=asked | {"min_score": 1})
        assert ids(none) == []
        assert none.json()["no_good_match"]

    with_service(test)


def clicks_of(world: Any) -> dict[str, dict[str, int]]:
    """query → product_id → clicks of the days of the hot lists, by pyarrow."""
    days = [pq.read_table(world.ingested.path / f"{n}.parquet") for n in ("pairs", "valid_pairs")]
    texts = pq.read_table(world.ingested.path / "queries.parquet")["text"].to_pylist()
    found: dict[str, dict[str, int]] = {}
    for row in (row for day in days for row in day.to_pylist()):
        of_query = found.setdefault(texts[row["query"]], {})
        name = world.ids[row["product"]]
        of_query[name] = of_query.get(name, 0) + row["clicks"]
    return found


def test_a_bundle_holds_what_was_clicked_for_every_query(world, monkeypatch, tmp_path) -> None:
    bundle, expected = Bundle(world.bundle), clicks_of(world)
    assert max(len(products) for products in expected.values()) > 2
    for query, products in expected.items():
        assert bundle.clicked(query) == products
    assert bundle.clicked("nobody asked this") == {}
    # A query with more products than are kept has the most clicked of them.
    monkeypatch.setattr(bundle_module, "CLICKED", 2)
    out, ingested = tmp_path / "out", tmp_path / "work[1]"  # no pattern, though it looks like one
    out.mkdir()
    ingested.symlink_to(world.ingested.path)
    bundle_module._write_clicked(ingested, "100MB", out)
    with sqlite3.connect(out / "products.sqlite") as db:
        kept = {query: json.loads(found) for query, found in db.execute("SELECT * FROM clicked")}
    for query, products in expected.items():
        assert sorted(kept[query].values()) == sorted(products.values())[-2:]
        assert kept[query].items() <= products.items()


def test_with_clicks_the_order_is_that_of_all_products_scores_raised_by_past_clicks(
    world, with_service
) -> None:
    encoder, weight = QueryEncoder.load(world.model), world.settings.serve.click_weight
    clicks = clicks_of(world)
    some = sorted(clicks, key=lambda query: -len(clicks[query]))[:10]

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        for query in [*some, "purple zebra"]:
            past = np.array([clicks.get(query, {}).get(name, 0) for name in world.ids])
            vector = encoder.encode([query])[0]
            cosine = world.vectors @ vector
            raised = cosine + weight * np.log1p(past)
            by_id = dict(zip(world.ids, raised.tolist(), strict=True))
            asked = {"q": query.upper(), "k": 5, "clicks": True}
            hits = (await client.get("/search", params=asked)).json()["hits"]
            np.testing.assert_allclose(
                [hit["score"] for hit in hits], np.sort(raised)[::-1][:5], atol=1e-5
            )
            np.testing.assert_allclose(
                [hit["score"] for hit in hits], [by_id[h["product_id"]] for h in hits], atol=1e-5
            )
            assert len({hit["product_id"] for hit in hits}) == 5
        # With words too, the raised order is what is fused with theirs.
        query = some[0]
        asked = {"q": query, "k": 200, "clicks": True}
        index = local.service.current().index
        by_words = index.by_words(query, encoder.encode([query])[0], 200, Filter())
        words = {hit.product.product_id: rank for rank, hit in enumerate(by_words, 1)}
        fused = {
            name: 1 / (60 + rank) + (1 / (60 + words[name]) if name in words else 0.0)
            for rank, name in enumerate(ids(await client.get("/search", params=asked)), 1)
        }
        hits = (await client.get("/search", params=asked | {"hybrid": True})).json()["hits"]
        scores = [hit["score"] for hit in hits]
        np.testing.assert_allclose(scores, [fused[hit["product_id"]] for hit in hits], atol=1e-6)
        assert scores == sorted(scores, reverse=True)
        # Scores of vectors are what is judged, not raised ones.
        cosine = world.vectors @ encoder.encode([query])[0]
        names = dict(zip(world.ids, cosine.tolist(), strict=True))
        middle = float(np.median(cosine))
        asked = {"q": query, "k": 200, "clicks": True, "min_score": round(middle, 6)}
        found = ids(await client.get("/search", params=asked))
        assert {*found} == {name for name, score in names.items() if score >= asked["min_score"]}
        none = await client.get("/search", params=asked | {"min_score": 1})
        assert (ids(none), none.json()["no_good_match"]) == ([], True)

    with_service(test)


def test_a_clicked_product_that_was_deleted_moved_or_is_filtered_out_is_found_as_it_is_now(
    world, with_service
) -> None:
    clicks = clicks_of(world)
    query = max(clicks, key=lambda query: len(clicks[query]))
    gone, moved, *_ = clicks[query]

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        asked = {"q": query, "k": 200, "clicks": True}
        before = ids(await client.get("/search", params=asked))
        assert {gone, moved} <= {*before}
        assert (await client.delete(f"/products/{gone}")).status_code == 202
        body = {"title": "zebra striped umbrella", "category": "umbrellas", "price": 3.5}
        assert (await client.put(f"/products/{moved}", json=body)).status_code == 202

        async def known() -> bool:
            return ids(await client.get("/search?q=x&category=umbrellas")) == [moved]

        await until(known)
        now = await client.get("/search", params=asked)
        assert sorted(ids(now)) == sorted({*before} - {gone})
        (hit,) = [hit for hit in now.json()["hits"] if hit["product_id"] == moved]
        assert hit["title"] == body["title"]
        vector = local.service.current().index.vector(moved)
        cosine = float(vector @ QueryEncoder.load(world.model).encode([query])[0])
        weight = world.settings.serve.click_weight
        expected = cosine + weight * np.log1p(clicks[query][moved])
        assert hit["score"] == pytest.approx(expected, abs=1e-5)
        for where in ({"category": "umbrellas"}, {"max_price": 3.5}):
            assert ids(await client.get("/search", params=asked | where)) == [moved]
        assert moved not in ids(await client.get("/search", params=asked | {"min_price": 4}))

    with_service(test)


def test_similar_items_are_the_nearest_without_the_product_itself(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        name = world.ids[5]
        hits = (await client.get(f"/similar/{name}")).json()["hits"]
        assert name not in [hit["product_id"] for hit in hits]
        itself = {"product_id": name, "score": 1.0}
        assert_best(world, [itself, *hits], world.vectors[5], 11)
        assert (await client.get("/similar/nobody")).status_code == 404

    with_service(test)


def test_an_upsert_is_found_by_its_own_title_and_a_delete_is_not(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        body = {"title": "zebra striped umbrella", "category": "umbrellas", "price": 12.5}
        name = "odd id/ä?#"
        put = await client.put(
            f"/products/{name}".replace("?", "%3F").replace("#", "%23"), json=body
        )
        assert put.status_code == 202, put.text

        async def known() -> bool:
            asked = {"q": "umbrella", "hybrid": True, "k": 80}
            return name in ids(await client.get("/search", params=asked))

        await until(known)
        found = await client.get("/search?q=x&category=umbrellas")
        assert ids(found) == [name]
        assert found.json()["hits"][0] | body == found.json()["hits"][0]
        victim = ids(await client.get("/search?q=shoe"))[0]
        assert (await client.delete(f"/products/{victim}")).status_code == 202

        async def gone() -> bool:
            return victim not in ids(await client.get("/search?q=shoe&k=80"))

        await until(gone)
        assert (await client.get(f"/products/{victim}")).status_code == 404

    with_service(test)


def test_a_change_of_price_or_stock_keeps_vector_and_photo(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        name, index = world.ids[5], local.service.current().index
        before = (await client.get(f"/products/{name}")).json()
        photo = (await client.get(f"/photos/{name}")).content
        assert (await client.patch(f"/products/{name}", json={"price": 0.5})).status_code == 202
        gone = await client.patch(f"/products/{name}", json={"in_stock": False})
        assert gone.status_code == 202

        async def known() -> bool:
            return not (await client.get(f"/products/{name}")).json()["in_stock"]

        await until(known)
        after = (await client.get(f"/products/{name}")).json()
        assert after == before | {"price": 0.5, "in_stock": False}
        np.testing.assert_array_equal(index.vector(name), world.vectors[5])
        assert (await client.get(f"/photos/{name}")).content == photo
        for query in ("in_stock=false", "max_price=0.5"):
            assert ids(await client.get(f"/search?q=shoe&{query}")) == [name]
        assert name not in ids(await client.get("/search?q=shoe&k=80&in_stock=true"))
        nobody = await client.patch("/products/nobody", json={"price": 1})
        assert nobody.status_code == 404
        assert (await client.patch(f"/products/{name}", json={})).status_code == 422
        await client.put("/products/new", json={"title": "new"})
        assert (await client.patch("/products/new", json={"price": 1})).status_code == 202
        await client.delete(f"/products/{name}")
        assert (await client.patch(f"/products/{name}", json={"price": 1})).status_code == 404

    with_service(test)


def test_a_put_without_a_photo_keeps_photo_and_hot_queries(world, with_service) -> None:
    hot = Bundle(world.bundle).hot_queries

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        index, row = (
            local.service.current().index,
            next(r for r, i in enumerate(world.ids) if hot(i)),
        )
        name = world.ids[row]
        photo = (await client.get(f"/photos/{name}")).content
        title = (await client.get(f"/products/{name}")).json()["title"]
        await client.put(f"/products/{name}", json={"title": title, "category": "changed"})
        await client.put("/products/new", json={"title": title})

        async def known() -> bool:
            return (await client.get("/products/new")).status_code == 200

        await until(known)
        assert (await client.get(f"/products/{name}")).json()["category"] == "changed"
        np.testing.assert_allclose(index.vector(name), world.vectors[row], atol=1e-5)
        assert np.abs(index.vector("new") - world.vectors[row]).max() > 1e-3  # it has no queries
        assert photo
        assert (await client.get(f"/photos/{name}")).content == photo
        await client.delete(f"/products/{name}")
        await client.put(f"/products/{name}", json={"title": title})

        async def bare() -> bool:
            return (await client.get(f"/photos/{name}")).status_code == 404

        await until(bare)

    with_service(test)


def test_a_request_of_more_photos_than_it_has_time_for_is_refused(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        shown = [{"product_id": f"n{i}", "title": "", "photo": jpeg()} for i in range(17)]
        answer = await client.post("/products", json={"products": shown})
        assert answer.status_code == 422
        assert "17 products have a photo, 16 at most" in answer.json()["error"]
        del shown[0]["photo"]
        assert (await client.post("/products", json={"products": shown})).status_code == 202

    with_service(test)


def test_a_restarted_service_has_the_changes_it_acknowledged(world, with_service) -> None:
    async def write(client: httpx.AsyncClient, local: Any) -> None:
        bodies = [{"product_id": f"n{i}", "title": f"new thing {i}"} for i in range(30)]
        assert (await client.post("/products", json={"products": bodies})).status_code == 202
        assert (await client.delete(f"/products/{world.ids[0]}")).status_code == 202

    async def read(client: httpx.AsyncClient, local: Any) -> None:
        everything = ids(await client.get("/search?q=thing&k=500"))
        assert set(everything) == {*world.ids[1:], *(f"n{i}" for i in range(30))}

    with_service(write)
    with_service(read)


def test_a_swap_takes_changes_over_to_the_new_model_and_fails_no_request(
    world, with_service
) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        await client.put("/products/new", json={"title": "red shoe"})
        old = (await client.get("/version")).json()["model"]
        publish(world.settings.workdir, world.other_bundle)
        versions = []

        async def swapped() -> bool:
            answer = await client.get("/search?q=red+shoe&k=161")
            assert answer.status_code == 200
            versions.append(answer.json()["version"])
            return versions[-1] != old

        await until(swapped, 60)
        new = QueryEncoder.load(world.other_bundle / "model")
        assert versions[-1] == new.version
        assert "new" in ids(await client.get("/search?q=red+shoe&k=161"))
        encoded = local.service.current().index.vector("new")
        assert encoded is not None
        sent = Source(Product("new", "red shoe"), None)
        own = await local.catalogue.encode(world.other_bundle, [sent])
        np.testing.assert_allclose(encoded, own[0], atol=1e-5)

    with_service(test)


@pytest.mark.parametrize("silent", [True, False])
def test_a_service_starts_without_its_writer_and_catches_up_when_it_is_back(
    world, with_service, monkeypatch, silent
) -> None:
    begin, down = Catalogue.begin, [True]

    async def gone(*arguments: Any) -> Any:
        while down and silent:
            await asyncio.sleep(0.05)
        if down:
            raise Unavailable("killed")
        return await begin(*arguments)

    async def write(client: httpx.AsyncClient, local: Any) -> None:
        await client.put("/products/new", json={"title": "new"})

    async def read(client: httpx.AsyncClient, local: Any) -> None:
        assert (await client.get("/ready")).status_code == 200
        assert len(ids(await client.get("/search?q=shoe"))) == 10
        assert (await client.get("/products/new")).status_code == 404
        down.clear()

        async def known() -> bool:
            return (await client.get("/products/new")).status_code == 200

        await until(known)

    with_service(write)
    monkeypatch.setattr(Catalogue, "begin", gone)
    monkeypatch.setattr(service, "START_SECONDS", 0.3)
    with_service(read)


def test_changes_go_on_while_a_bundle_that_cannot_be_loaded_is_tried_less_and_less_often(
    world, with_service, tmp_path, monkeypatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world.bundle, broken)
    shutil.rmtree(broken / "query_encoder")
    tried: list[float] = []

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        load = local.service.load

        async def slow(directory: Path) -> Loaded:
            tried.append(time.monotonic())
            if len(tried) == 1:
                await asyncio.sleep(3)
            return await load(directory)

        monkeypatch.setattr(local.service, "load", slow)
        publish(world.settings.workdir, broken)

        async def loads() -> bool:
            return len(tried) > 0

        async def known() -> bool:
            return (await client.get("/products/new")).status_code == 200

        async def tried_again() -> bool:
            return len(tried) == 5

        await until(loads)
        await client.put("/products/new", json={"title": "new"})
        await until(known)
        assert len(tried) == 1  # applied while the bundle was loaded
        await until(tried_again)
        assert str(broken) in (await client.get("/version")).json()["refused"]
        publish(world.settings.workdir, world.bundle)

        async def taken_over() -> bool:
            return (await client.get("/version")).json()["refused"] is None

        await until(taken_over)
        waited = np.diff(tried[1:5])
        assert waited[2] > 1.5 * waited[0]

    with_service(test, follow_seconds=0.1)


def test_a_newer_catalogue_supersedes_the_changes_made_before_it_was_written_but_for_stock(
    world, with_service, tmp_path
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(world.other_bundle, newer)
    info = json.loads((newer / "bundle.json").read_text())
    changed, deleted, back = world.ids[0], world.ids[1], world.ids[2]

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        gone = {"title": "of the old day", "in_stock": False}
        await client.put(f"/products/{changed}", json=gone)
        await client.patch(f"/products/{back}", json={"in_stock": False, "price": 1.25})
        await client.delete(f"/products/{deleted}")
        await asyncio.sleep(0.05)
        info["made"]["catalogue"] = datetime.now(UTC).isoformat()
        (newer / "bundle.json").write_text(json.dumps(info))
        await asyncio.sleep(0.05)
        await client.put("/products/later", json={"title": "of the new day"})
        await client.patch(f"/products/{back}", json={"in_stock": True})
        publish(world.settings.workdir, newer)

        async def swapped() -> bool:
            return (await client.get("/version")).json()["bundle"] == "newer"

        await until(swapped, 60)
        now = (await client.get(f"/products/{changed}")).json()
        assert now["title"] != "of the old day"
        assert not now["in_stock"]  # the catalogue does not say that it is there again
        assert (await client.get(f"/products/{back}")).json()["in_stock"]
        assert (await client.get(f"/products/{back}")).json()["price"] != 1.25
        assert (await client.get(f"/products/{deleted}")).status_code == 200
        assert (await client.get("/products/later")).json()["title"] == "of the new day"
        assert (await client.get("/version")).json()["changes"] == 6

    with_service(test)


def test_photos_of_old_and_of_new_products_are_served_as_jpegs(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        hit = (await client.get("/search?q=shoe")).json()["hits"][0]
        old = await client.get(hit["photo"])
        assert old.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(old.content)) as picture:
            assert max(picture.size) == 64
        await client.put("/products/new", json={"title": "x", "photo": jpeg(side=900)})

        async def known() -> bool:
            return (await client.get("/products/new")).status_code == 200

        await until(known)
        with Image.open(io.BytesIO((await client.get("/photos/new")).content)) as picture:
            assert picture.size == (320, 320)
        assert (await client.get("/photos/nobody")).status_code == 404

    with_service(test)


def bomb() -> str:
    """A PNG of a few kilobytes that claims 30,000 × 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


@pytest.fixture
def reads_photos(world: Any, tmp_path: Path) -> None:
    """The model that is published reads photos; the vectors of the bundle are of one that does not,
    those of products that are put are its own."""
    bundle, side = tmp_path / "reads-photos", 56
    shutil.copytree(world.bundle, bundle)
    shutil.rmtree(bundle / "model")
    model = world.settings.model.model_copy(update={"pixels": True, "image_attention_bias": 0.0})
    image = world.settings.image.model_copy(update={"pixel_side": side})
    tokenizer = load_tokenizer(world.model / "tokenizer")
    settings = world.settings.model_copy(update={"model": model, "image": image})
    new = DualEncoder.new(
        model, vocab_size=len(tokenizer), sep_token_id=tokenizer.sep_token_id, pixel_side=side
    )
    save_untrained(new, settings, world.model / "tokenizer", bundle / "model", 0)
    shutil.rmtree(bundle / "query_encoder")
    shutil.copytree(bundle / "model", bundle / "query_encoder")
    info = json.loads((bundle / "bundle.json").read_text())
    info["version"] = product_side_version(bundle / "model")
    (bundle / "bundle.json").write_text(json.dumps(info))
    publish(world.settings.workdir, bundle)


def test_a_photo_tells_products_of_one_title_apart(reads_photos, with_service) -> None:
    photos = {"red": jpeg((30, 30, 220)), "blue": jpeg((220, 30, 30))}

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        bodies = [{"product_id": n, "title": "bag", "photo": photo} for n, photo in photos.items()]
        assert (await client.post("/products", json={"products": bodies})).status_code == 202

        async def known() -> bool:
            return (await client.get("/products/blue")).status_code == 200

        await until(known)
        for name, photo in photos.items():
            found = await client.post("/search/photo", json={"photo": photo, "text": "bag"})
            assert ids(found)[0] == name
            best, second = (hit["score"] for hit in found.json()["hits"][:2])
            assert best == pytest.approx(1, abs=1e-5)
            assert second < 0.999

    with_service(test)


def test_a_model_that_reads_no_photos_refuses_to_search_by_one(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        asked = {"photo": jpeg(), "text": "red shoe"}
        answer = await client.post("/search/photo", json=asked)
        assert answer.status_code == 422
        assert "reads no photos" in answer.json()["error"]

    with_service(test)


def test_what_is_no_photo_is_refused_by_name_and_nothing_is_stored(
    reads_photos, with_service
) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        gif = base64.b64encode(b"GIF89a not really").decode()
        half = base64.b64encode(base64.b64decode(jpeg())[:300]).decode()
        broken = [
            (gif, "not an image"),
            (half, "truncated"),
            (bomb(), "too large"),
            ("?!", "no base64"),
        ]
        for photo, reason in broken:
            for path, body in [
                ("/products/x", {"title": "x", "photo": photo}),
                ("/search/photo", {"photo": photo}),
            ]:
                send = client.put if path.startswith("/products") else client.post
                answer = await send(path, json=body)
                assert answer.status_code == 422
                assert reason in answer.json()["error"].lower()
        assert local.catalogue._log.last() == 0

    with_service(test)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/search", 422),
        ("/search?q=", 422),
        ("/search?q=" + "x" * 257, 422),
        ("/search?q=x&k=0", 422),
        ("/search?q=x&k=501", 422),
        ("/search?q=x&min_price=nan", 422),
        ("/search?q=x&min_score=7", 422),
        ("/search?q=x&max_prize=1", 422),
        ("/similar/x?max_prize=1", 422),
        ("/search?q=%00%F0%9F%91%97%E2%80%8B%ED%A0%80", 200),
        ("/page/..%2F..%2Fconfig.py", 404),
        ("/page/page.html", 404),
        ("/photos/..%2F..%2Fbundle.json", 404),
        ("/docs", 404),
    ],
)
def test_odd_requests_get_a_reason_in_json(world, with_service, path: str, status: int) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        answer = await client.get(path)
        assert answer.status_code == status
        assert isinstance(answer.json(), dict)

    with_service(test)


def test_bodies_that_are_not_what_they_should_be_are_refused(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        for content in (b"", b"{", b"\xff\xfe", b"[]", b'{"queries": ["\\ud800"]}', b"1e999"):
            answer = await client.post(
                "/search/batch", content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (400, 422), content
            assert answer.json()["error"]

        asked = {"queries": 101 * ["shoe"], "k": 100}
        answer = await client.post("/search/batch", json=asked)
        assert answer.status_code == 422
        assert "queries times k is 10,100, 10,000 at most" in answer.json()["error"]

        async def endless():  # no content-length
            for _ in range(64):
                yield b"x" * 2**16

        for large in (b"x" * (2 * 2**20), endless()):
            assert (await client.post("/search/batch", content=large)).status_code == 413

    with_service(test, max_body_mb=1.0)


def test_a_key_guards_all_but_the_page_photos_and_health(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        for path in ("/", "/page/page.js", "/health", "/ready", f"/photos/{world.ids[0]}"):
            assert (await client.get(path)).status_code == 200, path
        for headers in ({}, {"x-api-key": "guess"}, {"x-api-key": "ä".encode()}):
            assert (await client.get("/search?q=x", headers=headers)).status_code == 401
            put = await client.put("/products/x", json={"title": "x"}, headers=headers)
            assert put.status_code == 401
        good = {"x-api-key": "secret"}
        assert (await client.get("/search?q=x", headers=good)).status_code == 200
        described = (await client.get("/openapi.json", headers=good)).json()
        (scheme,) = described["components"]["securitySchemes"].values()
        assert scheme == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                asked = path.format(product_id=world.ids[0])
                refused = (await client.request(method, asked)).status_code == 401
                assert refused == bool(operation.get("security")), path

    with_service(test, key="secret")


def test_a_copy_of_a_work_directory_serves_its_own_bundle(tmp_path: Path) -> None:
    publish(tmp_path / "a", tmp_path / "a" / "bundle" / "x")
    publish(tmp_path / "a", tmp_path / "elsewhere", arm="new")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert published(tmp_path / "a") == tmp_path / "a" / "bundle" / "x"
    assert published(tmp_path / "b") == tmp_path / "b" / "bundle" / "x"
    assert published(tmp_path / "b", "new") == tmp_path / "elsewhere"


def test_what_is_too_much_is_refused_at_once_and_the_rest_answered(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        asked = [client.get(f"/search?q=query+{i}") for i in range(40)]
        answers = await asyncio.gather(*asked)
        refused = [a for a in answers if a.status_code == 503]
        assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
        assert len(refused) == 40 - 5
        assert all(len(ids(a)) == 10 for a in answers if a not in refused)
        assert (await client.get("/search?q=after")).status_code == 200
        assert isinstance(local.app, Gate)
        assert local.app.running == 0

    with_service(test, max_requests=5)


def test_searches_find_a_place_beside_an_importers_requests(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        assert isinstance(local.app, Gate)
        products = [client.put(f"/products/n{i}", json={"title": f"new {i}"}) for i in range(30)]
        searches = [client.get(f"/search?q=query+{i}") for i in range(10)]
        answers = await asyncio.gather(*products, *searches)
        put, found = answers[:30], answers[30:]
        refused = [answer for answer in put if answer.status_code == 503]
        assert len(refused) == 30 - 2
        assert all("products and photos" in answer.json()["error"] for answer in refused)
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert [answer.status_code for answer in found] == 10 * [200]
        assert (local.app.running, local.app.encoding) == (0, 0)

    with_service(test, max_requests=16)


def test_a_product_that_is_there_twice_is_refused(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        twice = [{"product_id": "n", "title": title} for title in ("red shoe", "blue shoe")]
        answer = await client.post("/products", json={"products": twice})
        assert answer.status_code == 422
        assert "the product 'n' is there 2 times" in answer.json()["error"]
        assert local.catalogue._log.last() == 0

    with_service(test)


def test_a_batch_is_timed_once_and_its_searches_are_counted(
    world, with_service, monkeypatch
) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        timed, counted = [], []
        metrics = local.service.metrics
        monkeypatch.setattr(metrics, "stage", lambda *args: timed.append(args[:2]))
        monkeypatch.setattr(metrics.queries, "inc", lambda *labels: counted.append(labels[0]))
        hot = next(iter(Bundle(world.bundle).hot))
        await client.post("/search/batch", json={"queries": [hot, "purple zebra", "hat"], "k": 3})
        assert counted == ["hot", "tail", "tail"]
        batch = {"path": "batch", "arm": ""}
        assert timed == [("index", batch), ("total", batch)]

    with_service(test)


def test_every_answer_is_counted_by_its_status_and_probes_are_not(
    with_service, monkeypatch
) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        counted: list[str] = []

        async def fails(*_: object, **__: object) -> None:
            raise RuntimeError("a fault of the service")

        monkeypatch.setattr(local.service.metrics.answers, "inc", counted.append)
        for path in ("/health", "/ready", "/search?q=shoe", "/search", "/products/nobodys"):
            await client.get(path)
        await client.post("/search/batch", content=b"x" * (17 << 20))
        monkeypatch.setattr(local.service, "search", fails)
        with pytest.raises(RuntimeError):  # as the server would log it
            await client.get("/search?q=shoe")
        assert counted == ["200", "422", "404", "413", "500"]

    with_service(test)


def test_vectors_of_two_models_are_refused(world, with_service, tmp_path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(world.bundle, mixed)
    shutil.rmtree(mixed / "query_encoder")
    shutil.copytree(world.other_bundle / "query_encoder", mixed / "query_encoder")
    publish(world.settings.workdir, mixed)

    started: list[str] = []

    async def ask(client: httpx.AsyncClient, local: Any) -> None:
        started.append(local.service.current().version)

    with pytest.raises(UserError, match="query encoder of model"):
        with_service(ask)
    assert started == []
    info = json.loads((mixed / "bundle.json").read_text())
    (mixed / "bundle.json").write_text(json.dumps(info | {"version": "another"}))
    with pytest.raises(UserError, match="in a bundle of model another"):
        Bundle(mixed)


def cut_to_16_dimensions(bundle: Path, to: Path) -> Path:
    """A bundle as of a model that was cut when its products were embedded."""
    shutil.copytree(bundle, to)
    for name in ("vectors", "hot", "query_mean"):
        whole = np.load(to / f"{name}.npy")
        np.save(to / f"{name}.npy", np.ascontiguousarray(whole[..., :16]))
    vectors, ids = np.load(to / "vectors.npy"), ProductIndex.load(to / "index").product_ids
    index = ProductIndex.build(vectors, ids, vectors[:50], ann_from=1, kind="flat")
    index.save(to / "index")
    return to


def test_a_bundle_of_other_dimensions_than_the_query_encoders_is_refused_and_the_old_one_serves(
    world, with_service, tmp_path, caplog
) -> None:
    cut = cut_to_16_dimensions(world.bundle, tmp_path / "cut")

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        publish(world.settings.workdir, cut)

        async def refused() -> bool:
            return f"{cut}: vectors of different dimensions (products 16, index 16" in caplog.text

        await until(refused)
        assert len(ids(await client.get("/search?q=purple+zebra"))) == 10
        assert (await client.get("/version")).json()["bundle"] == world.bundle.name

    with_service(test)


def test_a_bundle_of_another_version_of_the_code_is_refused(world, tmp_path) -> None:
    broken = tmp_path / "older"
    shutil.copytree(world.bundle, broken)
    stage = json.loads((broken / "stage.json").read_text())
    stage["key"]["version"] -= 1
    (broken / "stage.json").write_text(json.dumps(stage))
    with pytest.raises(UserError, match="older: a bundle of another version of acebert; publish"):
        Bundle(broken)


def test_hot_queries_and_vectors_of_another_number_are_refused(world, tmp_path) -> None:
    shutil.copytree(world.bundle, tmp_path / "bundle")
    hot = np.load(tmp_path / "bundle" / "hot.npy")
    np.save(tmp_path / "bundle" / "hot.npy", hot[:-1])
    with pytest.raises(UserError, match=f"{len(hot)} hot queries and {len(hot) - 1} vectors"):
        Bundle(tmp_path / "bundle")


def unavailable(answer: httpx.Response, reason: str) -> bool:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    return reason in answer.json()["error"] and "/" not in answer.json()["error"]


def test_changes_are_put_off_while_no_bundle_is_published_that_can_be_read(
    world, with_service
) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        pointer = world.settings.workdir / "serving" / "published.json"
        pointer.rename(pointer.with_suffix(".away"))
        reason, name = "no bundle is published", world.ids[0]
        assert unavailable(await client.put("/products/new", json={"title": "new"}), reason)
        assert unavailable(await client.patch(f"/products/{name}", json={"price": 1}), reason)
        publish(world.settings.workdir, world.bundle)
        assert (await client.put("/products/new", json={"title": "new"})).status_code == 202

    with_service(test)


def test_changes_are_put_off_while_the_disk_is_full(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        db = local.catalogue._log._db
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages}")
        long = {"title": "x" * 2000}
        bodies = [{"product_id": f"n{i}", **long} for i in range(16)]
        reason = "the change log cannot be written: database or disk is full"
        assert unavailable(await client.post("/products", json={"products": bodies}), reason)
        db.execute(f"PRAGMA max_page_count={pages + 1000}")
        assert (await client.post("/products", json={"products": bodies})).status_code == 202

    with_service(test)


def test_a_query_encoder_apart_that_is_of_another_model_makes_the_service_unavailable(
    world, with_service
) -> None:
    async def other(bundle: Path, texts: Sequence[str]) -> tuple[str, np.ndarray]:
        return "another", world.vectors[: len(texts)]

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        local.service._encode_apart = other
        assert unavailable(await client.get("/search?q=purple+zebra"), "of another model")

    with_service(test, encoder_apart=True)


def test_a_swap_waits_until_the_query_encoder_apart_has_the_new_bundle(world, with_service) -> None:
    async def encode(bundle: Path, texts: Sequence[str]) -> tuple[str, np.ndarray]:
        if bundle == world.other_bundle and not ready.is_set():
            raise Unavailable("it is loaded still")
        encoder = QueryEncoder.load(bundle / "query_encoder")
        return encoder.version, encoder.encode(list(texts))

    ready = asyncio.Event()

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        local.service._encode_apart = encode
        publish(world.settings.workdir, world.other_bundle)

        async def swapped() -> bool:
            assert (await client.get("/search?q=purple+zebra")).status_code == 200
            return (await client.get("/version")).json()["bundle"] == world.other_bundle.name

        for _ in range(30):
            assert not await swapped()
            await asyncio.sleep(0.02)
        ready.set()
        await until(swapped)

    with_service(test, encoder_apart=True)


def test_a_runtime_that_a_bundle_lacks_is_refused_for_an_encoder_apart_too(
    world, with_service
) -> None:
    async def nothing(client: httpx.AsyncClient, local: Any) -> None:
        raise AssertionError("it started")

    with pytest.raises(UserError, match="which the runtime onnx needs"):
        with_service(nothing, encoder_apart=True, runtime="onnx")


def test_queries_that_nobody_clicked_after_are_not_hot(world, tmp_path) -> None:
    queries = pq.read_table(world.ingested.path / "queries.parquet")
    clicked = set(queries.filter(pc.field("clicks") > 0)["text"].to_pylist())
    assert 20 < len(clicked) < len(queries)
    many = world.settings.serve.model_copy(update={"hot_queries": 100_000})
    settings = world.settings.model_copy(update={"serve": many, "workdir": tmp_path})
    embedded = world.ingested.path.parents[1] / f"embed-{world.model.name}"
    stages = world.ingested, Stage("embed", embedded, world.model.name, 0.0, reused=True)
    bundle = build_bundle(settings, world.model, world.model, *stages).path
    assert set(Bundle(bundle).hot) == clicked
    info = json.loads((bundle / "bundle.json").read_text())
    assert info["hot_queries"] == len(clicked)
    assert 0 < info["hot_share_of_test_searches"] < 1


def test_many_products_are_encoded_a_few_at_a_time(world, monkeypatch) -> None:
    encoder, rows = ProductEncoder(world.bundle, 1, 10.0), []
    forward = encoder._model.encode_products

    def counted(text: Any, image: Any) -> Any:
        rows.append(len(text.input_ids))
        return forward(text, image)

    monkeypatch.setattr(encoder._model, "encode_products", counted)
    sources = [Source(Product(f"n{i}", "red shoe " * (i % 7)), None) for i in range(70)]
    vectors = encoder.encode(sources)
    assert max(rows) <= 32
    alone = np.concatenate([encoder.encode([source]) for source in sources])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_threads_that_search_have_as_many_of_faiss_as_are_set(world, with_service) -> None:
    async def test(client: httpx.AsyncClient, local: Any) -> None:
        in_pool = local.service._pool.submit(faiss.omp_get_max_threads)
        assert in_pool.result() == 3

    with_service(test, threads=3)


def test_another_query_encoder_of_the_same_name_makes_another_bundle(world, tmp_path) -> None:
    embedded = Stage("embed", world.model.parent / "embed-model0", "model0", 0.0, reused=True)
    made = set()
    for day in ("first", "second"):
        own = tmp_path / day / "distill" / "student"
        shutil.copytree(world.model, own)
        (own / "query_encoder.onnx").write_text(day)
        made.add(build_bundle(world.settings, world.model, own, world.ingested, embedded).path)
    assert len(made) == 2


def test_no_request_for_a_product_waits_for_sqlite_on_the_event_loop(
    world, with_service, monkeypatch
) -> None:
    used: list[tuple[int, int]] = []
    own = ProductTable._db.fget
    assert own is not None

    def noted(table: ProductTable) -> sqlite3.Connection:
        used.append((threading.get_ident(), id(own(table))))
        return own(table)

    async def test(client: httpx.AsyncClient, local: Any) -> None:
        monkeypatch.setattr(ProductTable, "_db", property(noted))
        for what in ("products", "photos", "similar"):
            asked = [client.get(f"/{what}/{name}") for name in world.ids[:8]]
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
        threads, connections = {thread for thread, _ in used}, {name for _, name in used}
        assert threading.get_ident() not in threads
        assert len(connections) == len(threads) > 1

    with_service(test)


def test_a_query_encoder_of_another_model_makes_no_bundle(world, with_service) -> None:
    nothing = Stage("embed", world.settings.workdir, "none", 0.0, reused=True)
    other = world.other_bundle / "model"
    with pytest.raises(UserError, match="another model"):
        build_bundle(world.settings, world.model, other, world.ingested, nothing)


def test_hot_lists_of_a_bundle_end_where_the_day_that_is_held_out_begins(world: Any) -> None:
    log = (world.ingested.path.parents[1] / "demo").glob("*/impressions/*.parquet")
    held_out = max(path.stem for path in log)
    assert Bundle(world.bundle).made["hot_lists"] == datetime.fromisoformat(f"{held_out}T00:00Z")
