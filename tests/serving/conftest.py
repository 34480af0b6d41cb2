"""A dual encoder with random weights as a model directory, and a student of it."""

import random
from pathlib import Path

import pytest
import yaml

from acebert.config import load_settings
from acebert.data.tokens import train_wordpiece
from acebert.models.dual import DualEncoder
from acebert.models.student import new_student
from acebert.serving.onnx_export import write_onnx

WORDS = ("red", "blue", "summer", "winter", "dress", "shirt", "shoes", "jeans", "men", "nike")


def write_model(directory: Path, model: DualEncoder, queries: list[str]) -> None:
    model.save(directory)
    tokenizer = train_wordpiece(queries * 3, vocab_size=200)
    tokenizer.save_pretrained(directory / "tokenizer")
    tree = {"text": {"query_tokens": 6}}
    (directory / "settings.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="session")
def queries() -> list[str]:
    """150 of one to eight words; the longest are cut."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(150)]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, queries: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    settings = load_settings(["--model.width", "64", "--model.heads", "4", "--model.layers", "3"])
    model = DualEncoder.new(settings.model, vocab_size=200, sep_token_id=3)
    write_model(directory, model, queries)
    write_onnx(directory)
    return directory


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, queries: list[str], teacher: Path) -> Path:
    directory = tmp_path_factory.mktemp("student")
    write_model(directory, new_student(DualEncoder.load(teacher), layers=1), queries)
    write_onnx(directory)
    return directory
