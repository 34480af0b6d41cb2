"""The partition plan, against an obvious twin of the paper's section 4.3 and counts by hand."""

import json
import subprocess
import sys
from itertools import chain, groupby
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from acebert.config import load_settings
from acebert.data import partitions
from acebert.data import plan_arithmetic as arithmetic
from acebert.data.partitions import Plan, lay_out_columns, plan, write_plan
from acebert.data.plan_arithmetic import (
    Layout,
    hard_share,
    layout_of,
    order_partitions,
    permute,
    random_hard_share,
)
from acebert.data.plan_figure import draw_plan, read_points, table_text
from acebert.errors import UserError
from acebert.workdir import Stage, is_disk_full

U64 = 2**64


# ------------------------------------------------------------------------------- the plain twins


def plain_hash(x: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % U64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % U64
    return x ^ x >> 31


def plain_feistel(x: int, a: int, b: int, keys: list[int], tweak: int = 0) -> int:
    """Black & Rogaway's figure 'method 3', line by line, an even number of rounds."""
    left, right = x % a, x // a
    for j, key in enumerate(keys, 1):
        f = plain_hash((right + key + tweak) % U64) >> 32
        size = a if j % 2 else b
        left, right = right, (left + (f * size >> 32)) % size
    return a * right + left


def plain_permute(x: int, n: int, keys: list[int]) -> int:
    a = int(np.ceil(np.sqrt(n)))
    b = int(np.ceil(n / a))
    y = plain_feistel(x, a, b, keys)
    while y >= n:
        y = plain_feistel(y, a, b, keys)
    return y


def plain_epoch(categories: list[int], W: int, P: int, seed: int, epoch: int) -> list[list[int]]:
    """All batches of an epoch in the order of steps, the short one last."""
    n = len(categories)
    deal = arithmetic.round_keys(seed, epoch, arithmetic.DEAL).tolist()
    cluster = arithmetic.round_keys(seed, epoch, arithmetic.CLUSTER).tolist()
    shuffle = np.random.SeedSequence([seed, epoch, arithmetic.SHUFFLE])
    dealt = [plain_permute(position, n, deal) for position in range(n)]
    sizes = [W * (n // W // P + (p < n // W % P)) for p in range(P)]
    batches: list[list[int]] = []
    for p in range(P):
        part, dealt = dealt[: sizes[p]], dealt[sizes[p] :]
        order = {c: plain_feistel(c, 256, 256, cluster, plain_hash(p + 1)) for c in set(categories)}
        part.sort(key=lambda pair: order[categories[pair]])  # stable: ties stay as dealt
        batches += [part[i : i + W] for i in range(0, len(part), W)]
    stepped = [batches[i] for i in np.random.default_rng(shuffle).permutation(len(batches))]
    return [*stepped, dealt] if dealt else stepped


# -------------------------------------------------------------------------------------- material


def categories_of(n: int, C: int, seed: int = 0) -> np.ndarray:
    """Category codes as uneven as a catalogue's: int32 [n]."""
    return (np.random.default_rng(seed).zipf(1.5, n) % C).astype(np.int32)


def write_pairs(path: Path, categories: np.ndarray) -> Path:
    n = len(categories)
    rng = np.random.default_rng(1)
    table = pa.table(
        {
            "pair": np.arange(n, dtype=np.int64),
            "query": rng.integers(0, 50, n).astype(np.int32),
            "product": rng.integers(0, 80, n).astype(np.int32),
            "category_code": categories,
        }
    )
    pq.write_table(table, path, row_group_size=max(1, n // 3))
    return path


def ingested(directory: Path, categories: np.ndarray) -> Stage:
    directory.mkdir(parents=True, exist_ok=True)
    write_pairs(directory / "pairs.parquet", categories)
    return Stage("ingest", directory, f"digest-{directory.name}", 0.0, False)


def epoch_of(layout: Layout, epoch: int, categories: np.ndarray) -> np.ndarray:
    C = int(categories.max()) + 1
    return order_partitions(layout, epoch, categories, C, 0, layout.partitions)[0]


def batches_of(reader: Plan, epoch: int) -> list[list[int]]:
    stop = reader.steps(epoch) + (reader.remainder > 0)
    return [reader.batch(epoch, step)["pair"].to_pylist() for step in range(stop)]


# ----------------------------------------------------------------------------------- permutation


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_permute_is_one_to_one(n: int, seed: int, epoch: int) -> None:
    y = permute(np.arange(n, dtype=np.uint64), n, arithmetic.round_keys(seed, epoch, 0))
    assert sorted(y.tolist()) == list(range(n))


@given(n=st.integers(1, 2**40), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=60, deadline=None)
def test_permute_equals_the_published_cipher(n: int, seed: int, data: st.DataObject) -> None:
    x = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    keys = arithmetic.round_keys(seed, 0, 0)
    expected = [plain_permute(value, n, keys.tolist()) for value in x]
    assert permute(np.array(x, np.uint64), n, keys).tolist() == expected


def test_two_values_of_permute_are_uniform_and_independent() -> None:
    n, bins, draws = 100, 5, 10_000
    counts = np.zeros((bins, bins))
    for seed in range(draws):
        y = permute(np.array([0, 1], np.uint64), n, arithmetic.round_keys(seed, 0, 0)) * bins // n
        counts[y[0], y[1]] += 1
    # Without replacement, the second value falls into the first one's bin a little less often.
    expected = np.full((bins, bins), 20 * 20) - 20 * np.eye(bins)
    assert stats.chisquare(counts, expected * draws / expected.sum(), axis=None).pvalue > 1e-3


def test_permute_is_the_same_in_any_chunking() -> None:
    n = 2 * arithmetic.CHUNK + 123
    keys = arithmetic.round_keys(7, 1, 0)
    x = np.arange(n, dtype=np.uint64)
    parts = [permute(part, n, keys) for part in np.array_split(x, 17)]
    np.testing.assert_array_equal(permute(x, n, keys), np.concatenate(parts))


# ------------------------------------------------------------------------------------ arithmetic


@given(
    n=st.integers(20, 400),
    W=st.integers(2, 20),
    C=st.integers(1, 12),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_order_equals_the_plain_twin(
    n: int, W: int, C: int, seed: int, data: st.DataObject
) -> None:
    P = data.draw(st.integers(1, n // W))
    layout = layout_of(n, W, P, seed)
    categories = categories_of(n, C, seed)
    batches = epoch_of(layout, 3, categories)
    steps = batches[arithmetic.batch_of_step(layout, 3)].tolist()
    if layout.remainder:
        steps.append(arithmetic.short_batch(layout, 3).tolist())
    assert steps == plain_epoch(categories.tolist(), W, P, seed, 3)


def test_partitions_made_apart_equal_those_made_together() -> None:
    layout = layout_of(5000, 16, 7, seed=4)
    categories = categories_of(5000, 30)
    apart = [order_partitions(layout, 0, categories, 30, p, p + 1) for p in range(7)]
    whole, same = order_partitions(layout, 0, categories, 30, 0, 7)
    np.testing.assert_array_equal(np.concatenate([batches for batches, _ in apart]), whole)
    assert sum(count for _, count in apart) == same


def test_sizes_are_multiples_of_w_and_differ_by_one_batch_at_most() -> None:
    layout = layout_of(1000, 16, 9, seed=0)
    firsts = [layout.first_batch(p) for p in range(10)]
    sizes = np.diff(firsts)
    assert firsts[-1] == 62 == 1000 // 16
    assert set(sizes) == {6, 7}
    expected = np.repeat(np.arange(9), sizes)
    got = layout.partition_of(np.arange(62, dtype=np.uint64))
    np.testing.assert_array_equal(got, expected)


def test_categories_are_contiguous_within_a_partition() -> None:
    layout = layout_of(4000, 20, 5, seed=1)
    categories = categories_of(4000, 25)
    batches = epoch_of(layout, 0, categories)
    for p in range(5):
        rows = batches[layout.first_batch(p) : layout.first_batch(p + 1)].reshape(-1)
        runs = [code for code, _ in groupby(categories[rows].tolist())]
        assert len(runs) == len(set(runs)) > 1


def test_each_partition_has_its_own_random_order_of_categories() -> None:
    # Two equal categories: which comes first in a partition is a fair coin.
    n, P = 64_000, 1000
    categories = (np.arange(n) % 2).astype(np.int32)
    batches = epoch_of(layout_of(n, 64, P, seed=0), 0, categories)
    first = categories[batches[:, 0]]
    assert stats.binomtest(int(first.sum()), P, 0.5).pvalue > 1e-3


def test_ties_are_ordered_at_random() -> None:
    # One category: the pair's number must not tell the slot it lands in.
    n = 50_000
    batches = epoch_of(layout_of(n, 50, 10, seed=0), 0, np.zeros(n, np.int32))
    assert abs(stats.spearmanr(batches.reshape(-1), np.arange(n)).statistic) < 4 / np.sqrt(n)


def test_partitions_are_independent_of_pair_and_category() -> None:
    n, P = 40_000, 20
    categories = categories_of(n, 8)
    layout = layout_of(n, 50, P, seed=3)
    batches = epoch_of(layout, 0, categories)
    partition = np.empty(n, int)
    partition[batches] = layout.partition_of(np.arange(len(batches), dtype=np.uint64))[:, None]
    for trait in (categories, np.arange(n) * 16 // n, np.arange(n) % 16):
        counts = np.zeros((P, trait.max() + 1))
        np.add.at(counts, (partition, trait), 1)
        assert stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue > 1e-3


def test_steps_mix_the_batches_of_all_partitions() -> None:
    layout = layout_of(100_000, 10, 10, seed=0)
    partition = layout.partition_of(arithmetic.batch_of_step(layout, 0).astype(np.uint64))
    counts = np.stack([np.bincount(part, minlength=10) for part in np.split(partition, 10)])
    assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_epochs_and_seeds_differ() -> None:
    categories = categories_of(1000, 5)
    one = epoch_of(layout_of(1000, 20, 5, seed=0), 0, categories)
    other_epoch = epoch_of(layout_of(1000, 20, 5, seed=0), 1, categories)
    other_seed = epoch_of(layout_of(1000, 20, 5, seed=1), 0, categories)
    for other in (other_epoch, other_seed):
        assert np.mean(one == other) < 0.05


# ------------------------------------------------------------------------------------ hard share


def test_hard_share_equals_a_hand_count() -> None:
    # Row 1: three of 7 see two like them, one sees none: (3·2 + 0)/(4·3). Row 2: two pairs: 4/12.
    codes = np.array([[7, 7, 2, 7], [1, 5, 5, 1]])
    assert hard_share(codes) == pytest.approx((6 / 12 + 4 / 12) / 2)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6))
def test_hard_share_equals_brute_force(rows: list[list[int]]) -> None:
    shares = [
        sum(row[i] == row[j] for j in range(5) if j != i) / 4 for row in rows for i in range(5)
    ]
    assert hard_share(np.array(rows)) == pytest.approx(np.mean(shares))


def test_random_hard_share_is_the_mean_over_all_pairs_of_pairs() -> None:
    codes = [0, 0, 0, 1, 1, 4]
    shares = [codes[i] == codes[j] for i in range(6) for j in range(6) if i != j]
    assert random_hard_share(np.bincount(codes)) == pytest.approx(np.mean(shares))


def test_order_counts_the_hard_share_of_its_batches() -> None:
    layout = layout_of(3000, 30, 4, seed=0)
    categories = categories_of(3000, 12)
    batches, same = order_partitions(layout, 0, categories, 12, 0, 4)
    assert same / (len(batches) * 30 * 29) == pytest.approx(hard_share(categories[batches]))


def test_hard_share_falls_with_partitions_to_that_of_random_batches() -> None:
    n, W = 20_000, 20
    categories = categories_of(n, 40)
    shares = [
        hard_share(categories[epoch_of(layout_of(n, W, P, seed=0), 0, categories)])
        for P in (1, 4, 16, 64, 250, 1000)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] == pytest.approx(random_hard_share(np.bincount(categories)), rel=0.02)


# -------------------------------------------------------------------------------------- settings


def test_partitions_default_to_the_papers_65_batches() -> None:
    assert layout_of(25_000_000, 384, None, 0).partitions == 1002
    assert layout_of(5000, 128, None, 0).partitions == 1


def test_more_partitions_than_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"plan\.partitions 40: .* 39 batches .* 1 to 39"):
        layout_of(5000, 128, 40, 0)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size 384: .*only 100 training pairs"):
        layout_of(100, 384, None, 0)


def test_sort_keys_that_would_overflow_are_refused() -> None:
    n = 1 << 24
    layout = Layout(pairs=n, batch_size=2, partitions=n // 2, seed=0)
    with pytest.raises(UserError, match=r"plan\.partitions"):
        order_partitions(layout, 0, np.zeros(1, np.int32), 2**31, 0, n // 2)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("pair", [0, 1, 3, 2], "row 2 has pair 3"),
        ("pair", [0, 1, 1, 3], "row 2 has pair 1"),
        ("category_code", [0, -4, 0, 0], "row 1 has category_code -4"),
        ("query", [0, None, 0, 0], "nulls in column query"),
    ],
)
def test_pairs_that_break_the_contract_are_refused(
    tmp_path: Path, column: str, values: list[int | None], message: str
) -> None:
    file = write_pairs(tmp_path / "pairs.parquet", np.zeros(4, np.int32))
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), file)
    with pytest.raises(UserError, match=message):
        lay_out_columns(file, tmp_path)


def test_a_full_disk_is_known_as_such(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.parquet", np.zeros(4, np.int32))
    (tmp_path / "rows.i4").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        lay_out_columns(file, tmp_path)
    assert is_disk_full(caught.value)


def test_missing_file_or_column_is_named(tmp_path: Path) -> None:
    tree = load_settings(["--workdir", str(tmp_path / "work")])
    stage = Stage("ingest", tmp_path, "digest", 0.0, False)
    with pytest.raises(UserError, match=r"pairs\.parquet: there is no such file"):
        plan(tree, stage)
    pq.write_table(pa.table({"pair": [0], "query": [0]}), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="lacks the columns product, category_code"):
        plan(tree, stage)


def test_opening_what_is_no_plan_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a partition plan"):
        Plan(tmp_path)


# ------------------------------------------------------------------------------------ the figure


def test_drawing_shows_the_exact_hard_share_of_each_number_of_partitions(tmp_path: Path) -> None:
    n, W = 1500, 16
    categories = categories_of(n, 15)
    stage = ingested(tmp_path / "ingest", categories)
    (stage.path / "products").mkdir()
    names = [None if code == 14 else f"type {code}" for code in range(15)]
    table = pa.table({"category": names, "category_code": np.arange(15, dtype=np.int32)})
    pq.write_table(table, stage.path / "products" / "part-00000.parquet")
    argv = ["--workdir", str(tmp_path), "--train.batch_size", str(W), "--train.epochs", "2"]
    drawn = draw_plan(load_settings([*argv, "--plan.partitions", "7", "--seed", "3"]), stage)
    points = read_points(drawn)
    assert [p.partitions for p in points] == [1, 2, 5, 7, 10, 20, 50, 93]
    assert [p.partitions for p in points if p.chosen] == [7]
    for point in points:
        shares = []
        for epoch in range(2):
            batches = plain_epoch(categories.tolist(), W, point.partitions, 3, epoch)
            shares.append(hard_share(categories[np.array(batches[:93])]))
        assert point.hard_share == pytest.approx(np.mean(shares))
        assert point.batches_per_partition == pytest.approx(n / (point.partitions * W))
    lines = table_text(points).splitlines()
    assert len(lines) == 9
    assert lines[4].endswith("← chosen")
    picture = cv2.imread(str(drawn.path / "plan.png"))
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_a_part_that_is_made_again_to_no_end_leaves_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray runs a task again whose node fell silent, and the first may still be writing."""
    layout = layout_of(640, 64, 2, 0)
    pairs, columns = write_pairs(tmp_path / "pairs.parquet", categories_of(640, 4)), tmp_path / "c"
    columns.mkdir()
    lay_out_columns(pairs, columns)
    partitions.epoch_dir(tmp_path, 0).mkdir()
    writer = partitions._PartWriter(
        tmp_path, columns, layout, partitions.parts_of(layout, 10**6), num_categories=4
    )
    block = {"epoch": np.array([0]), "part": np.array([0])}
    next(writer(block))
    (part,) = partitions.epoch_dir(tmp_path, 0).iterdir()
    content = part.read_bytes()

    def cut_off(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(partitions._PartWriter, "_write", cut_off)
    with pytest.raises(InterruptedError):
        next(writer(block))
    assert list(partitions.epoch_dir(tmp_path, 0).iterdir()) == [part]
    assert part.read_bytes() == content


# --------------------------------------------------------------------------------------- on Ray


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("part_rows", "blocks"), [(10**6, 1), (200, 7), (1, 3)])
def test_plan_is_the_twins_for_one_and_many_blocks_and_few_of_its_files_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int, blocks: int
) -> None:
    monkeypatch.setattr(partitions, "OPEN_PARTS", 2)
    n, W, P, seed, epochs = 1507, 16, 11, 5, 3
    categories = categories_of(n, 9)
    pairs = write_pairs(tmp_path / "pairs.parquet", categories)
    out = tmp_path / "plan"
    out.mkdir()
    write_plan(out, pairs, layout_of(n, W, P, seed), epochs, part_rows=part_rows, blocks=blocks)
    reader = Plan(out)
    rows = pq.read_table(pairs)
    for epoch in range(epochs):
        assert batches_of(reader, epoch) == plain_epoch(categories.tolist(), W, P, seed, epoch)
        for step in (0, reader.steps(epoch)):
            batch = reader.batch(epoch, step)
            expected = rows.take(batch["pair"]).select(["pair", "query", "product"])
            assert pa.Table.from_batches([batch]).equals(expected)
        mapped = Path("/proc/self/maps").read_text()
        parts = partitions.epoch_dir(out, epoch).glob("part-*.arrow")
        assert 1 <= sum(str(part) in mapped for part in parts) <= 3  # and the one of `batch`


@pytest.mark.usefixtures("ray_cluster")
def test_plan_stage_holds_each_pair_once_an_epoch_in_batches_of_w(tmp_path: Path) -> None:
    n, W = 5000, 128
    categories = categories_of(n, 20)
    stage = ingested(tmp_path / "ingest", categories)
    argv = ["--workdir", str(tmp_path), "--train.epochs", "20", "--train.batch_size", str(W)]
    tree = load_settings([*argv, "--plan.partitions", "5"])
    built = plan(tree, stage)
    again = plan(tree, stage)
    assert (again.path, again.reused) == (built.path, True)
    reader = Plan(built.path)
    assert (reader.epochs, reader.batch_size, reader.partitions) == (20, W, 5)
    orders = set()
    for epoch in range(20):
        batches = batches_of(reader, epoch)
        assert [len(batch) for batch in batches] == [W] * 39 + [n % W]
        assert sorted(chain(*batches)) == list(range(n))
        orders.add(tuple(batches[0]))
        assert reader.hard_share_by_epoch[epoch] == pytest.approx(
            hard_share(categories[np.array(batches[:-1])])
        )
    assert len(orders) == 20
    report = json.loads((built.path / "report.json").read_text())
    assert (report["pairs"], report["remainder"], report["steps"]) == (n, n % W, 39)
    assert not (built.path / "columns").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_one_category_and_no_remainder_work(tmp_path: Path) -> None:
    stage = ingested(tmp_path / "ingest", np.full(640, 3, np.int32))
    argv = ["--workdir", str(tmp_path), "--train.epochs", "1", "--train.batch_size", "64"]
    reader = Plan(plan(load_settings(argv), stage).path)
    assert reader.remainder == 0
    assert reader.hard_share_by_epoch == [1.0]
    assert sorted(chain(*batches_of(reader, 0))) == list(range(640))
    with pytest.raises(IndexError, match="step 10 of an epoch of 10 batches"):
        reader.batch(0, 10)
    with pytest.raises(IndexError, match="epoch 1 of a plan of 1 epochs"):
        reader.steps(1)


@pytest.mark.usefixtures("ray_cluster")
def test_reading_a_batch_copies_nothing(tmp_path: Path) -> None:
    stage = ingested(tmp_path / "ingest", categories_of(600, 4))
    argv = ["--workdir", str(tmp_path), "--train.epochs", "2", "--train.batch_size", "64"]
    reader = Plan(plan(load_settings(argv), stage).path)
    before = pa.total_allocated_bytes()
    batches = [reader.batch(1, step)["query"].to_numpy() for step in range(reader.steps(1))]
    assert pa.total_allocated_bytes() - before < 64 * len(batches)
    assert not batches[0].flags.writeable


def test_plan_arithmetic_imports_no_ray() -> None:
    code = "import sys, acebert.data.partitions; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
