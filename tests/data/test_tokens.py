"""The vocabulary that titles and queries are cut by."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from acebert.config import Settings, load_settings
from acebert.data.tokens import Ragged, backbone_digest, load_tokenizer, tokenize, train_wordpiece
from acebert.errors import UserError
from acebert.workdir import Stage

TITLES = ["red cotton shirt", "blue denim trousers", "green wool scarf"] * 5


def catalogue(directory: Path, titles: list[str]) -> Stage:
    """The files of an ingest stage that tokens are made of."""
    (directory / "products").mkdir(parents=True)
    rows = {"product": pa.array(range(len(titles)), pa.int32()), "title": titles}
    pq.write_table(pa.table(rows), directory / "products" / "part-0.parquet")
    asked = {"query": pa.array([0], pa.int32()), "text": ["red shirt"], "clicks": [3]}
    pq.write_table(pa.table(asked), directory / "queries.parquet")
    return Stage("ingest", directory, directory.name, 0.0, reused=False)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    argv = ["--recipe", "twinbert_tiny", "--workdir", str(tmp_path), "--text.vocab_size", "120"]
    return load_settings(argv)


def test_a_models_own_vocabulary_cuts_a_catalogue_that_has_changed_since(
    settings: Settings, tmp_path: Path
) -> None:
    """A vocabulary trained anew gives other ids to the same words."""
    before = tokenize(settings, catalogue(tmp_path / "a", TITLES))
    grown = catalogue(tmp_path / "b", [*TITLES, *["amber velvet gown"] * 9])
    anew = tokenize(settings, grown)
    by_the_model = tokenize(settings, grown, before.path / "tokenizer")
    old, new, own = (Ragged.load(s.path, "titles") for s in (before, anew, by_the_model))
    assert any(old[row].tolist() != new[row].tolist() for row in range(len(TITLES)))
    assert all(old[row].tolist() == own[row].tolist() for row in range(len(TITLES)))
    ours = load_tokenizer(by_the_model.path / "tokenizer").get_vocab()
    assert ours == load_tokenizer(before.path / "tokenizer").get_vocab()


def test_a_models_vocabulary_on_its_own_catalogue_is_the_stage_it_was_trained_on(
    settings: Settings, tmp_path: Path
) -> None:
    ingested = catalogue(tmp_path / "a", TITLES)
    trained_on = tokenize(settings, ingested)
    again = tokenize(settings, ingested, trained_on.path / "tokenizer")
    assert again.reused
    assert again.path == trained_on.path


def test_the_same_texts_give_the_same_vocabulary() -> None:
    """Ties abound: every word comes equally often."""
    letters = "abcdefghij"
    texts = [f"{a}{b}{c}{a} {c}{b}" for a in letters for b in letters for c in "xyz"] * 2
    first, *others = (train_wordpiece(texts, 150) for _ in range(6))
    vocabulary = first.get_vocab()
    assert all(other.get_vocab() == vocabulary for other in others)
    assert len(vocabulary) == 150
    assert set(first.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert "[UNK]" not in first.tokenize("AXYB jz")


def test_a_tokenizer_with_other_special_tokens_is_refused_by_the_one_that_lacks(
    tmp_path: Path,
) -> None:
    tokenizer = train_wordpiece(["red shoe", "blue bag"] * 20, 40)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    backend.add_special_tokens(list(names.values()))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: its tokenizer has no \[CLS\]"):
        load_tokenizer(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").cls_token == "[CLS]"


def test_a_backbone_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    """An environment that is installed anew has the same ones, of another time."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"of a model")
    os.utime(weights, ns=(0, 0))
    before = backbone_digest(str(tmp_path))
    os.utime(weights, ns=(0, 1))
    assert backbone_digest(str(tmp_path)) == before
    weights.write_bytes(b"of another")
    assert backbone_digest(str(tmp_path)) != before
