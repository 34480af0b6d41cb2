"""A pre-training step: samples a second, time by part, share of the machine's matrix peak.

    python benchmarks/pretrain_step.py --recipe cebert_tiny
    python benchmarks/pretrain_step.py --recipe cebert --model.backbone none --device cuda

The catalogue is drawn: titles and queries of random words, random photos and patch features of the
recipe's sizes, written as the stages write them and read as training reads them. `--resident` makes
the batches beforehand and keeps them on the device, so that what is left is the step itself;
`--profile` prints where its time goes. A sample is a row: a text, with one photo where the recipe
reads photos. No Ray is needed.

FLOPs are torch's own count of the matrix products of a step, padding included; the peak is the
trainer's own, what this machine does on products of the encoder's sizes alone.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertTokenizer

from acebert.config import Settings, load_settings
from acebert.data.features import N_PATCHES, Shard, ShardEntry, write_shard, write_shard_list
from acebert.data.tokens import SPECIAL_TOKENS, Ragged
from acebert.training.pairs import StagePaths
from acebert.training.pretrain import new_model
from acebert.training.pretrain_batches import PretrainBatch, PretrainBatches
from acebert.training.pretrainer import Pretrainer

VOCABULARY = 30_522  # of bert-base-uncased: as many logits a masked word
CATEGORIES = 100
SHARD_ROWS = 500
PATCH_DIM = {"resnet18": 512}  # the other CNNs of the recipes have 2048


def draw_catalogue(settings: Settings, root: Path, products: int) -> StagePaths:
    """Files of the stages before training, with titles of 4 to 20 word pieces and as many queries,
    of 1 to 7."""
    rng = np.random.default_rng(0)
    ingest, tokens = root / "ingest", root / "tokens"
    for folder in (ingest / "products", ingest / "lookups", tokens):
        folder.mkdir(parents=True)
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL_TOKENS)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary).save_pretrained(tokens / "tokenizer")
    for name, least, most in (("titles", 4, 20), ("queries", 1, 7)):
        lengths = rng.integers(least, most + 1, products)
        texts = [rng.integers(len(SPECIAL_TOKENS), VOCABULARY, n).tolist() for n in lengths]
        Ragged.from_rows(texts).save(tokens, name)
    codes = rng.integers(0, CATEGORIES, products)
    columns = {
        "title": [f"title {i}" for i in range(products)],
        "category": [f"category {code}" for code in codes],
        "category_code": pa.array(codes, pa.int32()),
    }
    pq.write_table(pa.table(columns), ingest / "products" / "part-00000.parquet")
    pq.write_table(pa.table({"clicks": np.ones(products, int)}), ingest / "queries.parquet")
    for name in ("pair_hot_list", "product_hot_lists", "product_pairs"):
        np.save(ingest / "lookups" / f"{name}.npy", np.zeros(1, np.int32))
    for name in ("clicked", "hot_lists"):
        Ragged.from_rows([[0]]).save(ingest / "lookups", name)
    features = draw_features(settings, root, products) if settings.reads_images else None
    return StagePaths(ingest, tokens, features)


def draw_features(settings: Settings, root: Path, products: int) -> Path:
    """Patches and pixels of a photo a product, both, whichever the recipe reads."""
    rng = np.random.default_rng(0)
    features = root / "features"
    features.mkdir()
    D1, S = PATCH_DIM.get(settings.image.cnn, 2048), settings.image.pixel_side
    entries: list[ShardEntry] = []
    for first in range(0, products, SHARD_ROWS):
        rows = np.arange(first, min(products, first + SHARD_ROWS), dtype=np.int32)
        n = len(rows)
        shard = Shard(
            rows,
            np.ones(n, bool),
            np.zeros((n, 4), np.int32),
            rng.random((n, N_PATCHES, D1), np.float32).astype(np.float16),
            np.frombuffer(rng.bytes(n * S * S * 3), np.uint8).reshape(n, S, S, 3),
        )
        entries.append(write_shard(features, f"part-{first:09d}.arrow", shard))
    write_shard_list(features, entries, D1, S)
    return features


def flops_of(trainer: Pretrainer, batch: PretrainBatch) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        trainer.step(batch, 0, 0.0)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--products", type=int, default=4000)
    parser.add_argument("--resident", action="store_true", help="batches made beforehand")
    parser.add_argument("--profile", action="store_true", help="what the kernels take")
    args, rest = parser.parse_known_args()
    settings = load_settings(rest)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        paths = draw_catalogue(settings, Path(scratch), args.products)
        batches = PretrainBatches(settings, paths, rank=0, world=1)
        trainer = Pretrainer(settings, new_model(settings, paths), device, 0, 1)
        trainer.model.train()
        first = batches.batch(0).to(device)
        rows, L = first.inputs.text.input_ids.shape
        trainer.step(first, 0, 0.0)  # measures the peak
        assert trainer.peak is not None
        flops = flops_of(trainer, first)
        warm = max(3, args.steps // 5)
        stream: Iterator[PretrainBatch] = batches.stream(0, warm + args.steps)
        if args.resident:
            stream = cycle([batches.batch(step).to(device) for step in range(4)])
        for step, batch in enumerate(islice(stream, warm)):
            trainer.step(batch.to(device), step, 0.0)
        parts: dict[str, list[torch.Tensor]] = {}
        waited = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = asked = time.perf_counter()
        steps = 0
        for batch in islice(stream, args.steps):
            waited += time.perf_counter() - asked
            metrics = trainer.step(batch.to(device), steps, 0.0)
            for name, value in metrics.items():
                if name.startswith("seconds_"):  # looked at when all is done: nothing waits
                    parts.setdefault(name, []).append(value)
            steps += 1
            asked = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        what = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
        print(
            f"{settings.recipe}: {trainer.model.config.num_hidden_layers} layers of width "
            f"{trainer.model.config.hidden_size}, {rows} rows of {L} + "
            f"{trainer.model.config.image_tokens} tokens, {settings.train.precision}, {what}, "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
        )
        print(f"{rows / seconds:10,.0f} samples/s, {1e3 * seconds:.1f} ms a step")
        print(f"{1e3 * waited / steps:10.1f} ms waiting for data")
        for name, values in parts.items():
            mean = float(torch.stack(values).mean())
            print(f"{1e3 * mean:10.1f} ms {name.removeprefix('seconds_')}")
        rate, peak = flops / seconds, trainer.peak
        print(
            f"{rate / 1e9:10,.0f} GFLOP/s, {100 * rate / peak:.0f} % of the {peak / 1e9:,.0f} "
            "measured on the encoder's products"
        )
        if args.profile:
            activities = [ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            with profile(activities=activities) as profiler:
                for step in range(3):
                    trainer.step(first, step, 0.0)
            order = f"self_{device.type}_time_total"
            print(profiler.key_averages().table(sort_by=order, row_limit=25))


if __name__ == "__main__":
    main()
