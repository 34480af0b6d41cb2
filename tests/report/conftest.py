"""Results of every row, from made-up vectors that the real evaluation measured: no training."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_world import TYPES, World, make_world, random_vectors, write_vectors

from acebert.config import Settings
from acebert.evaluation.evaluate import BASELINES, evaluate_baselines, evaluate_embeddings
from acebert.evaluation.tables import Row
from acebert.report.parts import PARTS, systems_of
from acebert.report.rows import RIVAL, UNTRAINED, ZERO_SHOT, System
from acebert.report.run import Measured, Results
from acebert.workdir import Stage

SEEDS = (0, 1)
MORE_TYPES = (*TYPES, "belt", "scarf", "coat", "dress", "glove", "tie", "boot")
"""48 queries, of which 44 were clicked before: enough to claim something; 4 are not"""
NOISE = {"good": 0.1, "fair": 0.6, "bad": 5.0, "as bad": 5.0}
"""how far a product's vector is from that of the queries that want it"""
LEVEL = {"TwinBERT": "bad", "FashionBERT-Finetune": "as bad", "CE-BERT-Finetune": "fair"}
"""level of a row; the others are good"""


@dataclass(frozen=True)
class Made:
    settings: Settings
    ingested: Stage
    rows: dict[str, tuple[Path, ...]]
    """level → result directories, one a seed"""
    results: Results
    swept: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("report")
    world = make_world(root, types=MORE_TYPES, searches=900)
    _write_report(world.ingested.path)
    rows, vectors = {}, {}
    for number, (level, noise) in enumerate(NOISE.items()):
        vectors[level] = [
            _vectors(world, root / f"{level}{seed}", noise, 10 * number + seed) for seed in SEEDS
        ]
        rows[level] = tuple(
            evaluate_embeddings(world.settings, world.ingested, directory, level).path
            for directory in vectors[level]
        )
    pretrained = world.settings.workdir / "pretrain" / "p"
    pretrained.mkdir(parents=True)
    (pretrained / "report.json").write_text('{"train_seconds": 1000}')
    results = Results(left_out={ZERO_SHOT: "no model <is> given"})
    baselines = evaluate_baselines(world.settings, world.ingested).path
    for name in BASELINES:
        results.rows[UNTRAINED[name]] = Measured(Row(UNTRAINED[name], (baselines / name,)))
    results.rows[RIVAL] = Measured(
        Row(RIVAL, rows["bad"][:1]), (0,), seconds=60.0, pairs=100, others={"model": "mini-lm"}
    )
    for systems in systems_of(PARTS).values():
        for system in systems:
            level = LEVEL.get(system.name, "good")
            of_seed = tuple(row / system.part for row in rows[level])
            results.rows[system.name] = Measured(
                Row(system.name, of_seed),
                SEEDS,
                tuple(_model(_model_of(root, system, seed), seed) for seed in SEEDS),
                tuple(vectors[level]),
                90.0,
                24_960,
                {"gauc": 0.625, "recall_100": 0.875},
                world.settings,
            )
    return Made(
        world.settings,
        world.ingested,
        rows,
        results,
        _swept(root / "swept", _model(root / "finetune" / "swept", 0), rows),
    )


def _vectors(world: World, out: Path, noise: float, seed: int) -> Path:
    """A query lies amid the products that were clicked for it, but for the noise."""
    queries = random_vectors(world.queries, 1)
    rng = np.random.default_rng(seed)
    products = {}
    for product in world.product_ids:
        wanted = [queries[q] for q, p in world.clicked if p == product] or [rng.standard_normal(16)]
        vector = np.sum(wanted, axis=0) / np.linalg.norm(np.sum(wanted, axis=0))
        vector = vector + noise * rng.standard_normal(16) / 4
        products[product] = vector / np.linalg.norm(vector)
    return write_vectors(out, products, queries)


def _model_of(root: Path, system: System, seed: int) -> Path:
    """Those that differ in nothing but the fusion are one model."""
    return root / "finetune" / "-".join([system.recipe, *system.changed, str(seed)])


def _model(directory: Path, seed: int) -> Path:
    """It took 90 seconds, and started from a pre-training of 1,000."""
    directory.mkdir(parents=True, exist_ok=True)
    loss = 8 - np.linspace(0, 4, 60) + np.random.default_rng(seed).normal(0, 0.1, 60)
    table = pa.table({"step": np.arange(1, 61), "loss": loss})
    pq.write_table(table, directory / "history.parquet")
    report = {"train_seconds": 90, "machine": "an abacus, 2 CPUs", "code": f"c0de{seed}"}
    (directory / "report.json").write_text(json.dumps(report))
    (directory / "stage.json").write_text('{"key": {"pretrain": "p"}}')
    return directory


def _write_report(ingested: Path) -> None:
    split = {"first": "2026-01-03", "last": "2026-01-03", "searches": 300, "rows": 2400}
    report = {
        "products": {"rows_kept": 144, "categories": 5, "without_image": 6},
        "rows_written": {"pairs": 129},
        "splits": {name: {**split, "clicks": 100} for name in ("train", "valid", "test")},
    }
    (ingested / "report.json").write_text(json.dumps(report))


def _swept(directory: Path, model: Path, rows: dict[str, tuple[Path, ...]]) -> Path:
    """All its trials have one `model`."""
    directory.mkdir()
    trials = [
        {
            "plan.batches_per_partition": 64 / partitions,
            "status": "finished",
            "reason": None,
            "partitions": partitions,
            "batches_per_partition": 64 / partitions,
            "hard_share": 0.9 / partitions,
            "seed": seed,
            "test_gauc": 0.6,
            "test_recall_100": 0.5,
            "model": str(model),
            "test_row": str(rows[level][seed]),
        }
        for partitions, level in ((64, "fair"), (8, "good"), (1, "bad"))
        for seed in SEEDS
    ]
    failed = {**trials[0], "status": "failed", "reason": "out of memory", "test_row": None}
    pq.write_table(pa.Table.from_pylist([*trials, failed]), directory / "trials.parquet")
    return directory
