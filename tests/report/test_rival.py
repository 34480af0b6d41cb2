"""sentence-transformers itself, at the smallest size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import make_world
from transformers import BertConfig, BertModel, BertTokenizer

from acebert.config import load_settings
from acebert.data.tokens import SPECIAL_TOKENS
from acebert.evaluation.evaluate import evaluate_embeddings, read_vectors
from acebert.evaluation.tables import read_metrics
from acebert.report.rival import sentence_transformers_stage


def small_model(directory: Path, texts: list[str]) -> Path:
    """Random weights; each word of the texts is a word piece."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    BertTokenizer(vocab=vocabulary).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), intermediate_size=64, **sizes)
    BertModel(config).save_pretrained(directory)
    return directory


def test_the_rival_is_fine_tuned_and_measured_with_judged_queries(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    world = make_world(tmp_path)
    start = small_model(tmp_path / "start", [*world.titles, *world.queries])
    judged = tmp_path / "judged.qrels"
    judged.write_text("zenith+hat 0 sku-024 1\n")
    argv = ["--workdir", str(tmp_path), "--train.precision", "fp32", "--train.batch_size", "8"]
    settings = load_settings([*argv, "--eval.bootstrap", "50"])
    asked = load_settings([*argv, "--eval.bootstrap", "50", "--eval.qrels", str(judged)])
    as_it_comes = sentence_transformers_stage(settings, world.ingested, start, 0, 1e-2)
    tuned = sentence_transformers_stage(asked, world.ingested, start, 64, 1e-2)
    report = json.loads((tuned.path / "report.json").read_text())
    assert report["pairs"] == 64
    assert report["train_seconds"] > 0
    before, after = (
        read_vectors(stage.path / "products.parquet", "product_id", world.product_ids)
        for stage in (as_it_comes, tuned)
    )
    assert np.abs(before - after).max() > 0.01
    row = evaluate_embeddings(asked, world.ingested, tuned.path, "rival").path
    assert read_metrics(row)["judged"]["queries"] == 1
