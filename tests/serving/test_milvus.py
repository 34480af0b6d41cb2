"""Embedded Milvus against the FAISS index: the same bundle, the same changes, the same hits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from acebert.errors import UserError
from acebert.serving.bundle import Bundle
from acebert.serving.catalogue import Unavailable
from acebert.serving.live_index import LiveIndex
from acebert.serving.products import Change, Filter, Patch, Product

pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed (extra: milvus)")

from milvus_lite.server_manager import server_manager_instance
from pymilvus import MilvusClient

from acebert.serving.milvus import MilvusIndex, drop_collections


def test_milvus_answers_as_faiss_does_also_after_changes_and_when_opened_again(
    shared_world, tmp_path: Path
) -> None:
    bundle = Bundle(shared_world.bundle)
    first = bundle.products([0])[0]
    d = bundle.vectors.shape[1]
    queries = np.random.default_rng(0).standard_normal((4, d)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    filters = [
        Filter(),
        Filter(category=first.category),
        Filter(category='odd " Küche'),
        Filter(min_price=10.0, max_price=50.0),
        Filter(max_price=30.0),
        Filter(min_price=45.9, max_price=45.9),
        Filter(in_stock=False),
    ]
    changes = [
        Change(1, first.product_id, None, None),
        Change(2, "new", Product("new", "zebra", 'odd " Küche', 20.0), queries[0]),
        Change(3, "gone out", Product("gone out", "x", None, None, in_stock=False), queries[1]),
    ]
    second = bundle.products([1])[0].product_id
    patched = [
        Change(4, second, None, None, Patch(12.5, in_stock=False)),
        Change(5, "new", None, None, Patch(price=45.9)),
        Change(6, first.product_id, None, None, Patch(price=1.0)),  # which is deleted
        Change(7, "nobody", None, None, Patch(price=1.0)),
    ]
    faiss, uri = LiveIndex(bundle), str(tmp_path / "milvus.db")

    def compare(milvus: MilvusIndex) -> None:
        for where in filters:
            ours, theirs = (index.search(queries, 8, where) for index in (faiss, milvus))
            for a, b in zip(ours, theirs, strict=True):
                names = [h.product.product_id for h in b]
                assert len(set(names)) == len(names)
                assert all(where.allows(h.product) for h in b)
                np.testing.assert_allclose([h.score for h in b], [h.score for h in a], atol=1e-5)
        for name in (first.product_id, "new", "gone out", "nobody"):
            mine, other = faiss.product(name), milvus.product(name)
            assert (mine and mine.title) == (other and other.title)
            vectors = faiss.vector(name), milvus.vector(name)
            if vectors[0] is None:
                assert vectors[1] is None
            else:
                np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)

    milvus = MilvusIndex(bundle, uri)
    compare(milvus)
    for index in (faiss, milvus):
        index.apply(changes)
    compare(milvus)
    milvus.apply(changes)  # as a replica that starts does
    for index in (faiss, milvus):
        index.apply(patched)
    compare(milvus)
    assert faiss.product(second) == milvus.product(second)
    names = [first.product_id, "new", "gone out", "nobody", second]
    for where in (Filter(), Filter(max_price=faiss.product(second).price)):
        mine, other = (index.by_ids(names, queries[0], where) for index in (faiss, milvus))
        scores = [{hit.product.product_id: hit.score for hit in hits} for hits in (mine, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert second in scores[0]
    with pytest.raises(UserError, match="hybrid"):
        milvus.by_words("zebra", queries[0], 3, Filter())


def test_milvus_looks_through_as_many_lists_as_the_bundles_index_was_set_to(
    shared_world, tmp_path: Path
) -> None:
    bundle = tmp_path / "ivf"
    shutil.copytree(shared_world.bundle, bundle)
    info, n = json.loads((bundle / "index" / "index.json").read_text()), len(shared_world.ids)
    uri = str(tmp_path / "milvus.db")

    def opened(effort: int) -> MilvusIndex:
        changed = info | {"kind": "ivf", "effort": effort}
        (bundle / "index" / "index.json").write_text(json.dumps(changed))
        return MilvusIndex(Bundle(bundle), uri)

    opened(1)
    client = MilvusClient(uri)
    client.flush("acebert_ivf")  # Milvus Lite has no index of what is in its memory
    client.release_collection("acebert_ivf")
    few, every = (
        opened(effort).search(shared_world.vectors[:1], n, Filter())[0] for effort in (1, n)
    )
    assert 0 < len(few) < len(every) == n


def test_a_milvus_that_does_not_answer_as_it_should_makes_the_service_unavailable(
    shared_world, tmp_path: Path
) -> None:
    bundle, uri = Bundle(shared_world.bundle), str(tmp_path / "milvus.db")
    milvus = MilvusIndex(bundle, uri)
    client = MilvusClient(uri)
    for name in client.list_collections():
        client.drop_collection(name)
    first, query = bundle.products([0])[0].product_id, np.array(bundle.vectors[:1])
    for asked in (
        lambda: milvus.search(query, 1, Filter()),
        lambda: milvus.product(first),
        lambda: milvus.apply([Change(1, first, None, None)]),
    ):
        with pytest.raises(Unavailable, match="Milvus: "):
            asked()


def test_collections_of_bundles_that_are_gone_are_dropped_from_a_server_and_no_others(
    shared_world, tmp_path: Path
) -> None:
    stays, gone = shared_world.bundle, tmp_path / "gone"
    shutil.copytree(stays, gone)
    file = str(tmp_path / "milvus.db")
    uri = server_manager_instance.start_and_get_uri(file)
    assert uri is not None
    for bundle in (stays, gone):
        MilvusIndex(Bundle(bundle), uri)
    client = MilvusClient(uri)
    both = {f"acebert_{name}{end}" for name in (stays.name, "gone") for end in ("", "_filled")}
    assert set(client.list_collections()) == both
    drop_collections(file, [gone])  # a file is its service's alone
    assert set(client.list_collections()) == both
    drop_collections(uri, [gone, tmp_path / "never filled"])
    assert set(client.list_collections()) == {
        f"acebert_{stays.name}",
        f"acebert_{stays.name}_filled",
    }
    server_manager_instance.release_server(file)
