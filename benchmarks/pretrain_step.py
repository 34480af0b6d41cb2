"""A pre-training step: samples a second, time by part, share of the machine's matrix peak.

    python benchmarks/pretrain_step.py --recipe cebert_tiny
    python benchmarks/pretrain_step.py --recipe cebert --model.backbone none --device cuda

The catalogue is drawn: titles of random words, random photos and patch features of the recipe's
sizes, written as the stages write them and read as training reads them. `--resident` makes the
batches beforehand and keeps them on the device, so that what is left is the step itself;
`--profile` prints where its time goes. A sample is a row: a title with one photo. No Ray is needed.

FLOPs are torch's own count of the matrix products of a step, padding included; the peak is what
this machine does on products of the encoder's sizes alone.
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

from acebert.config import Settings, load_settings
from acebert.data.features import N_PATCHES, Shard, ShardEntry, write_shard, write_shard_list
from acebert.data.tokens import Ragged, train_wordpiece
from acebert.models.encoder import load_backbone
from acebert.models.pretraining import start_pretraining
from acebert.training.flops import matrix_peak
from acebert.training.pairs import StagePaths
from acebert.training.pretrain_batches import PretrainBatch, PretrainBatches
from acebert.training.pretrainer import Pretrainer

VOCABULARY = 30_522  # of bert-base-uncased: as many logits a masked word
CATEGORIES = 100
SHARD_ROWS = 500
PATCH_DIM = {"resnet18": 512}  # the other CNNs of the recipes have 2048


def draw_catalogue(root: Path, products: int, patch_dim: int, pixel_side: int) -> StagePaths:
    """Files of the stages before training, with titles of 4 to 20 word pieces."""
    rng = np.random.default_rng(0)
    ingest, tokens, features = (root / name for name in ("ingest", "tokens", "features"))
    for folder in (ingest / "products", ingest / "lookups", tokens, features):
        folder.mkdir(parents=True)
    tokenizer = train_wordpiece((f"w{i}" for i in range(2000)), vocab_size=2000)
    tokenizer.save_pretrained(tokens / "tokenizer")
    low = len(tokenizer.all_special_ids)
    lengths = rng.integers(4, 21, products)
    Ragged.from_rows([rng.integers(low, len(tokenizer), n).tolist() for n in lengths]).save(
        tokens, "titles"
    )
    Ragged.from_rows([[low]]).save(tokens, "queries")
    columns = {
        "title": [f"title {i}" for i in range(products)],
        "category_code": pa.array(rng.integers(0, CATEGORIES, products), pa.int32()),
    }
    pq.write_table(pa.table(columns), ingest / "products" / "part-00000.parquet")
    for name in ("pair_hot_list", "product_hot_lists", "product_pairs"):
        np.save(ingest / "lookups" / f"{name}.npy", np.zeros(1, np.int32))
    for name in ("clicked", "hot_lists"):
        Ragged.from_rows([[0]]).save(ingest / "lookups", name)
    entries: list[ShardEntry] = []
    for first in range(0, products, SHARD_ROWS):
        rows = np.arange(first, min(products, first + SHARD_ROWS), dtype=np.int32)
        n, S = len(rows), pixel_side
        shard = Shard(
            rows,
            np.ones(n, bool),
            np.zeros((n, 4), np.int32),
            rng.random((n, N_PATCHES, patch_dim), np.float32).astype(np.float16),
            np.frombuffer(rng.bytes(n * S * S * 3), np.uint8).reshape(n, S, S, 3),
        )
        entries.append(write_shard(features, f"part-{first:09d}.arrow", shard))
    write_shard_list(features, entries, patch_dim, pixel_side)
    return StagePaths(ingest, tokens, features)


def new_trainer(settings: Settings, device: torch.device, patch_dim: int) -> Pretrainer:
    model = settings.model
    encoder = load_backbone(
        model.backbone,
        layers=model.layers,
        dropout=model.dropout,
        vocab_size=VOCABULARY,
        sep_token_id=3,
        width=model.width,
        heads=model.heads,
        patch_dim=patch_dim if model.patches else 0,
        pixel_side=settings.image.pixel_side if model.pixels else 0,
        pooling=model.pooling,
    )
    return Pretrainer(settings, start_pretraining(encoder, model.backbone), device, 0, 1)


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
    patch_dim = PATCH_DIM.get(settings.image.cnn, 2048)
    with tempfile.TemporaryDirectory() as scratch:
        paths = draw_catalogue(Path(scratch), args.products, patch_dim, settings.image.pixel_side)
        batches = PretrainBatches(settings, paths, rank=0, world=1)
        trainer = new_trainer(settings, device, patch_dim)
        trainer.model.train()
        first = batches.batch(0).to(device)
        rows, L = first.inputs.text.input_ids.shape
        tokens = rows * (L + trainer.model.config.image_tokens)
        bf16 = settings.train.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        peak = matrix_peak(trainer.model.config, tokens, device, dtype)
        flops = flops_of(trainer, first)
        stream: Iterator[PretrainBatch] = batches.stream(0, batches.steps_per_epoch)
        if args.resident:
            stream = iter([batches.batch(step).to(device) for step in range(4)])
        stream = cycle(stream) if args.resident else stream
        warm = max(3, args.steps // 5)
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
        print(
            f"{flops / seconds / 1e9:10,.0f} GFLOP/s, {100 * flops / seconds / peak:.0f} % of the "
            f"{peak / 1e9:,.0f} measured on the encoder's products"
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
