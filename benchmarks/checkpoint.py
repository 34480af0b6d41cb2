"""What checkpointing costs a training: stall, share of the step time, seconds behind its back.

    python benchmarks/checkpoint.py [--every 100] [--threads 2]

`acebert_tiny`'s size and a 4-layer BERT of width 384 with BERT's vocabulary, titles and queries of
random words, W=128 and 384. Blocks of steps with a checkpoint and blocks without take turns, and a
block's time is all of it, the writing behind the steps included. `stall` is how long `save` kept
the step waiting, `copy` its CPU time, `sync` what writing it there and then would take, `write` the
CPU time of that. `share` is what is lost with a checkpoint every `--every` steps.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acebert.config import ModelSettings
from acebert.models.dual import DualEncoder
from acebert.models.encoder import TextInputs
from acebert.models.losses import semantic_matching_loss
from acebert.models.parameters import adamw_groups
from acebert.training.checkpoint import Checkpoints, Progress


@dataclass(frozen=True)
class Size:
    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    steps_a_block: int


SIZES = (
    Size("acebert_tiny", 2, 128, 4, 8000, 128, 20),
    Size("4 x 384", 4, 384, 12, 30522, 384, 3),
)


class Trainer:
    """Encoder, AdamW and one batch of random words: all that a step and a checkpoint need."""

    def __init__(self, size: Size) -> None:
        model = ModelSettings(
            backbone=None, layers=size.layers, width=size.width, heads=size.heads, dropout=0.0
        )
        self.model = DualEncoder.new(model, vocab_size=size.vocabulary, sep_token_id=102)
        groups = adamw_groups(self.model, (), 1e-4, 1.0, 0.01)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.query, self.product = (
            _words(size.batch, length, size.vocabulary) for length in (8, 20)
        )

    def step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            v_q = self.model.encode_queries(self.query)
            v_p = self.model.encode_products(self.product)
        loss, _ = semantic_matching_loss(v_q, v_p, self.model.gamma)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def tensors(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def _words(batch: int, length: int, vocabulary: int) -> TextInputs:
    ids = torch.randint(0, vocabulary, (batch, length))
    return TextInputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))


def measure(size: Size, blocks: int, directory: Path) -> dict[str, float]:
    trainer = Trainer(size)
    checkpoints = Checkpoints(directory, {}, keep=2)
    progress = Progress()
    for _ in range(3):
        trainer.step()
    checkpoints.save(trainer.tensors(), progress)  # the buffers are made once
    kinds = ("with", "without", "stall", "copy", "sync", "write")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for block in range(2 * blocks):
        checkpoints.wait()
        kind = "with" if block % 2 else "without"
        start = time.perf_counter()
        for i in range(size.steps_a_block):
            trainer.step()
            progress.step += 1
            if kind == "with" and i == 0:
                before, cpu = time.perf_counter(), time.thread_time()
                checkpoints.save(trainer.tensors(), progress)
                seconds["copy"].append(time.thread_time() - cpu)
                seconds["stall"].append(time.perf_counter() - before)
        seconds[kind].append(time.perf_counter() - start)
    for _ in range(3):
        progress.step += 1
        start, cpu = time.perf_counter(), time.process_time()
        checkpoints.save(trainer.tensors(), progress)
        checkpoints.wait()
        seconds["write"].append(time.process_time() - cpu)
        seconds["sync"].append(time.perf_counter() - start)
    found = {name: float(np.median(values)) for name, values in seconds.items()}
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    found["lost"] = float(np.median([a - b for a, b in pairs]))
    newest = checkpoints.newest()
    assert newest is not None
    found["bytes"] = sum(file.stat().st_size for file in newest.iterdir())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8, help="of each kind")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{'size':<14}{'MiB':>8}{'step ms':>10}{'stall ms':>10}{'copy ms':>10}{'lost ms':>10}"
        f"{'sync ms':>10}{'write ms':>10}{'share':>9}"
    )
    for size in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(size, args.blocks, Path(scratch))
        step = found["without"] / size.steps_a_block
        print(
            f"{size.name:<14}{found['bytes'] / 2**20:>8.0f}{1e3 * step:>10.0f}"
            f"{1e3 * found['stall']:>10.1f}{1e3 * found['copy']:>10.1f}{1e3 * found['lost']:>10.1f}"
            f"{1e3 * found['sync']:>10.1f}{1e3 * found['write']:>10.1f}"
            f"{found['lost'] / (args.every * step):>9.2%}"
        )


if __name__ == "__main__":
    main()
