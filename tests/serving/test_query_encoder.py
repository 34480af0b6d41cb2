"""The query encoder in each runtime, against the dual encoder on one query at a time."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from acebert.config import load_settings
from acebert.data.tokens import train_wordpiece
from acebert.errors import UserError
from acebert.models.dual import DualEncoder
from acebert.models.encoder import HOT_QUERY, TextInputs
from acebert.models.student import new_student
from acebert.serving.onnx_export import write_onnx
from acebert.serving.query_encoder import QueryEncoder
from acebert.serving.student_table import RUNTIMES, TEACHER, as_text

WORDS = ("red", "blue", "summer", "winter", "dress", "shirt", "shoes", "jeans", "men", "nike")


def write_model(directory: Path, model: DualEncoder, queries: list[str]) -> None:
    model.save(directory)
    tokenizer = train_wordpiece(queries * 3, vocab_size=200)
    tokenizer.save_pretrained(directory / "tokenizer")
    tree = {"text": {"query_tokens": 6}}
    (directory / "settings.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def queries() -> list[str]:
    """150 of one to eight words; the longest are cut."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(150)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, queries: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    settings = load_settings(["--model.width", "64", "--model.heads", "4", "--model.layers", "3"])
    model = DualEncoder.new(settings.model, vocab_size=200, sep_token_id=3)
    write_model(directory, model, queries)
    write_onnx(directory)
    return directory


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, queries: list[str], teacher: Path) -> Path:
    directory = tmp_path_factory.mktemp("student")
    write_model(directory, new_student(DualEncoder.load(teacher), layers=1), queries)
    write_onnx(directory)
    return directory


@torch.inference_mode()
def one_at_a_time(directory: Path, queries: list[str]) -> np.ndarray:
    """transformers' tokenizer, no padding, no batches."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    model = DualEncoder.load(directory).eval()
    vectors = []
    for query in queries:
        pieces = tokenizer(query, add_special_tokens=False)["input_ids"][:6]
        ids = torch.tensor([[tokenizer.cls_token_id, *pieces, tokenizer.sep_token_id]])
        text = TextInputs(ids, torch.ones_like(ids).bool(), torch.full_like(ids, HOT_QUERY))
        vectors.append(model.encode_queries(text))
    return torch.cat(vectors).numpy()


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_vectors_are_the_dual_encoders_for_any_number_of_queries_of_any_length(
    which: str, runtime: str, queries: list[str], request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which)
    encoder = QueryEncoder.load(directory, runtime)
    expected = one_at_a_time(directory, queries)
    for n in (1, 7, 64, 150):
        got = encoder.encode(queries[:n])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[:n], atol=2e-6)
    assert encoder.encode([]).shape == (0, encoder.dim) == (0, 128)


def test_int8_vectors_stay_close_to_those_in_fp32(teacher: Path, queries: list[str]) -> None:
    """Eight bits err by 1/256 of the range at most in each of a few products in a row."""
    int8 = QueryEncoder.load(teacher, "onnx_int8").encode(queries)
    cosine = np.einsum("qd,qd->q", int8, one_at_a_time(teacher, queries))
    np.testing.assert_allclose(np.linalg.norm(int8, axis=1), 1, atol=1e-5)
    assert cosine.min() > 0.98
    assert cosine.max() < 1 - 1e-6  # it is not fp32 under another name


def test_queries_are_normalised_as_in_training(teacher: Path) -> None:
    encoder = QueryEncoder.load(teacher)
    written, stored = encoder.encode(["  RED\u00a0Ｄress ", "red dress"])
    np.testing.assert_array_equal(written, stored)


def test_a_student_has_its_teachers_version_and_other_product_weights_have_another(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    version = QueryEncoder.load(teacher).version
    assert QueryEncoder.load(student, "onnx_int8").version == version
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    weights = load_file(other / "model.safetensors")
    weights["tower.projection.bias"] += 1e-6
    save_file(weights, other / "model.safetensors")
    assert QueryEncoder.load(other).version != version


def test_what_is_missing_or_broken_is_named(teacher: Path, tmp_path: Path) -> None:
    for name in ("query_encoder.onnx", "model.safetensors", "config.json", "settings.yaml"):
        directory = tmp_path / name.replace(".", "_")
        shutil.copytree(teacher, directory)
        (directory / name).unlink()
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            QueryEncoder.load(directory, "onnx")
    directory = tmp_path / "broken"
    shutil.copytree(teacher, directory)
    (directory / "query_encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"query_encoder\.onnx"):
        QueryEncoder.load(directory, "onnx")
    (directory / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"config\.json"):
        QueryEncoder.load(directory, "onnx_int8")


@pytest.mark.parametrize("kept", [float("nan"), 0.5])
def test_a_table_without_a_good_row_says_so(kept: float) -> None:
    row = dict.fromkeys(("recall_100", "kept_100_new", "overlap_100", "cosine", "megabytes"), 0.0)
    times = {f"ms_batch{b}_threads{t}": 1.0 for b in (1, 32) for t in (1, 2)}
    table = {TEACHER: {key: {**row, **times, "kept_100": kept} for key in RUNTIMES}}
    assert as_text(table).endswith("none keeps 98% of Recall@100\n")
