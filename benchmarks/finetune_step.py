"""A fine-tuning step: pairs a second, time by part, share of the machine's matrix peak, memory.

    python benchmarks/finetune_step.py --random --recipe acebert_tiny
    python benchmarks/finetune_step.py --random --recipe acebert --device cuda \\
        --train.batch_size 4096 --train.micro_batch 1024
    python benchmarks/finetune_step.py --rival --recipe twinbert_tiny --data.products … \\
        --model.backbone DIR --model.layers 6 --train.batch_size 384

Trains with the trainer's own step (`acebert.training.finetuner`), on one device and without Ray
Train. The batches come from the stages of the settings, made first where they are missing, so that
the wait for data counts. With `--random` they are drawn beforehand (distinct queries of 6 tokens
and titles of 14 on average, a photo each) and need neither data nor Ray.

`--rival` lets sentence-transformers' own trainer (MultipleNegativesRankingLoss) take turns with
ours: same backbone and layers, pairs, batch size, precision and cores. Its row has the ratio.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acebert.config import Settings, load_settings
from acebert.errors import UserError
from acebert.job import run_job
from acebert.models.dual import DualEncoder
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.training.finetuner import SPEED, Finetuner
from acebert.training.pairs import PairBatches, Side, TrainBatch

PATCH_DIM = {"resnet18": 512}  # of `--random`; other CNNs here have 2048
VOCABULARY = 30522


def random_batches(settings: Settings, steps: int) -> Iterator[TrainBatch]:
    """Two batches in turn, drawn before the first is asked for."""
    rng = np.random.default_rng(settings.seed)
    W, images = settings.train.batch_size, settings.reads_images
    drawn = [
        TrainBatch(_random_side(settings, rng, 6, False), _random_side(settings, rng, 14, images),
                   None, None, None)
        for _ in range(2)
    ]  # fmt: skip
    assert all(len(batch.query) == W for batch in drawn)
    return (drawn[step % 2] for step in range(steps))


def _random_side(settings: Settings, rng: np.random.Generator, mean: int, with_image: bool) -> Side:
    """W rows of 3 to 2·mean − 3 tokens, each length as likely."""
    W, S = settings.train.batch_size, settings.image.pixel_side
    tokens = np.sort(rng.integers(3, 2 * mean - 2, W))
    mask = torch.from_numpy(np.arange(tokens.max()) < tokens[:, None])
    ids = torch.from_numpy(rng.integers(999, VOCABULARY, mask.shape)) * mask
    image = None
    if with_image:
        D1 = PATCH_DIM.get(settings.image.cnn, 2048)
        image = ImageInputs(
            torch.ones(W, dtype=torch.bool),
            torch.rand(W, 16, D1).half() if settings.model.patches else None,
            torch.randint(256, (W, S, S, 3), dtype=torch.uint8) if settings.model.pixels else None,
        )
    pair_row = torch.from_numpy(rng.permutation(W))
    return Side(TextInputs(ids, mask, mask.long()), image, tokens, np.full(W, with_image), pair_row)


def random_model(settings: Settings) -> DualEncoder:
    """At the settings' sizes; a backbone that is no local directory is replaced by random weights
    of BERT-base's width, which take the same time."""
    model = settings.model
    if model.backbone is not None and not Path(model.backbone).is_dir():
        model = model.model_copy(update={"backbone": None})
    return DualEncoder.new(
        model,
        vocab_size=VOCABULARY,
        sep_token_id=102,
        patch_dim=PATCH_DIM.get(settings.image.cnn, 2048) if model.patches else 0,
        pixel_side=settings.image.pixel_side if model.pixels else 0,
        gamma=settings.loss.gamma,
        gamma_learned=settings.loss.gamma_learned,
    )


def staged(
    settings: Settings, device: torch.device
) -> tuple[DualEncoder, PairBatches, list[tuple[str, str]]]:
    """Model, batches and the first epoch's (query, title) from the stages of the settings."""
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    from acebert.pipeline import catalogue_stages, plan_stage
    from acebert.training.finetune import new_model
    from acebert.training.pairs import StagePaths

    data, planned = catalogue_stages(settings), plan_stage(settings)
    features = data.features.path if data.features else None
    paths = StagePaths(data.ingested.path, data.tokens.path, features, planned.path)
    batches = PairBatches(settings, paths, rank=0, world_size=1, device=device)
    queries = pq.read_table(paths.ingest / "queries.parquet").sort_by("query")["text"]
    products = ds.dataset(paths.ingest / "products").to_table(columns=["product", "title"])
    titles = products.sort_by("product")["title"]
    records = [batches.plan.batch(0, step) for step in range(min(40, batches.steps_per_epoch))]
    pairs = [
        pair
        for record in records
        for pair in zip(
            queries.take(record["query"]).to_pylist(),
            titles.take(record["product"]).to_pylist(),
            strict=True,
        )
    ]
    return new_model(settings, paths), batches, pairs


class Rival:
    """sentence-transformers' trainer on the same pairs."""

    def __init__(self, settings: Settings, pairs: list[tuple[str, str]]) -> None:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer

        self.settings = settings
        self.model = SentenceTransformer(str(settings.model.backbone), device="cpu")
        transformer: Any = self.model[0]
        layers = transformer.auto_model.config.num_hidden_layers
        if layers != settings.model.layers:
            raise UserError(f"--model.layers {settings.model.layers}: the rival trains {layers}")
        queries, titles = zip(*pairs, strict=True)
        self.data = Dataset.from_dict({"anchor": queries, "positive": titles})

    def seconds(self, steps: int) -> float:
        """For so many steps, start-up not counted."""
        from sentence_transformers import SentenceTransformerTrainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.losses import MultipleNegativesRankingLoss
        from transformers import TrainerCallback

        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as directory:
            arguments = Arguments(
                output_dir=directory,
                max_steps=steps + 1,  # the first is not timed
                per_device_train_batch_size=self.settings.train.batch_size,
                learning_rate=self.settings.train.lr,
                bf16=self.settings.train.precision == "bf16",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=True,
            )
            loss = MultipleNegativesRankingLoss(self.model)
            SentenceTransformerTrainer(
                self.model, arguments, self.data, loss=loss, callbacks=[Clock()]
            ).train()
        return ends[-1] - ends[0]


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    steps, turns = arguments.steps, arguments.turns
    total = turns * (steps + 1)
    if arguments.random:
        model, stream = random_model(settings), random_batches(settings, total)
    else:
        model, batches, pairs = staged(settings, device)
        stream = batches.stream(0, total)
    if arguments.rival:
        if arguments.random:
            raise UserError("--rival reads the texts of real pairs: leave --random out")
        rival = Rival(settings, pairs)
    tuner = Finetuner(settings, model, device, rank=0, world=1)
    tuner.model.train()
    W = settings.train.batch_size
    print(
        f"{settings.recipe}: W {W}, micro batch {settings.train.micro_batch}, "
        f"{settings.train.precision}, {device}, {torch.get_num_threads()} threads, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
    )
    before = memory(device)
    rows: list[dict[str, float]] = []
    ratios: list[tuple[float, float]] = []
    step = 0
    for turn in range(turns):
        start = time.perf_counter()
        for i in range(steps + 1):
            if i == 1:  # the first of a turn warms caches up
                start = time.perf_counter()
            metrics, _, _ = tuner.encoder_step(next(stream).to(device), step, share=0.0)
            step += 1
            if i:
                rows.append({name: float(metrics[name]) for name in SPEED})
        if device.type == "cuda":
            torch.cuda.synchronize()
        ours = steps * W / (time.perf_counter() - start)
        if arguments.rival:
            ratios.append((ours, steps * W / rival.seconds(steps)))
            print(
                f"turn {turn + 1}: ours {ours:.0f} pairs/s, sentence-transformers "
                f"{ratios[-1][1]:.0f}, ratio {ours / ratios[-1][1]:.2f}, load {load()}"
            )
    report(tuner, rows, before, device)
    if ratios:
        print(f"ratio, median of the turns: {statistics.median(a / b for a, b in ratios):.2f}")


def report(
    tuner: Finetuner, rows: list[dict[str, float]], before: float, device: torch.device
) -> None:
    """Medians over the steps."""
    rows = [row for row in rows if row["flops"] == row["flops"]]  # a GPU's first has no times yet
    median = {name: statistics.median(row[name] for row in rows) for name in SPEED}
    parts = [name for name in SPEED if name.startswith("seconds_")]
    whole = sum(median[name] for name in parts)
    for name in parts:
        share = median[name] / whole
        print(f"  {name.removeprefix('seconds_'):<10} {median[name]:8.3f} s  {share:6.1%}")
    assert tuner.peak is not None
    best = max(row["peak_share"] for row in rows)
    print(
        f"  {median['pairs_per_second']:.0f} pairs/s, {median['flops'] / 1e9:.0f} GFLOP/s of "
        f"{tuner.peak / 1e9:.0f} that the products alone reach: {median['peak_share']:.1%} "
        f"(best step {best:.1%}), load {load()}"
    )
    print(f"  memory {memory(device):.2f} GB at its peak, {before:.2f} GB before the first step")


def memory(device: torch.device) -> float:
    """Peak so far [GB]: of the process, or of what is allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def load() -> str:
    return f"{os.getloadavg()[0]:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--random", action="store_true", help="random batches, no stages, no Ray")
    parser.add_argument("--rival", action="store_true", help="sentence-transformers takes turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns")
    run_job(work, __doc__, parser)
