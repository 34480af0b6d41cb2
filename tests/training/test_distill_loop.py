"""Distillation in plain torch, on targets made by hand."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acebert.config import Settings, load_settings
from acebert.data.tokens import Ragged, train_wordpiece
from acebert.errors import UserError
from acebert.models.distillation import distillation_losses
from acebert.models.dual import DualEncoder
from acebert.models.student import new_student
from acebert.training.checkpoint import Progress
from acebert.training.distill_loop import run
from acebert.training.distill_validation import HeldOutQueries
from acebert.training.distiller import Distiller
from acebert.training.steps import Rank
from acebert.training.teacher_targets import TeacherTargets

CPU = torch.device("cpu")
SMALL = [
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "2"],
    *["--model.embedding_dim", "16", "--train.precision", "fp32", "--train.checkpoint_every", "4"],
    *["--distill.batch_size", "32", "--distill.random_products", "8", "--distill.lr", "2e-3"],
    *["--distill.validate_every", "10", "--distill.warmup_steps", "2", "--distill.epochs", "4"],
]
TEXTS, VALID, PRODUCTS = 160, 40, 150


@pytest.fixture
def settings() -> Settings:
    return load_settings(SMALL)


@pytest.fixture(scope="module")
def teacher() -> DualEncoder:
    settings = load_settings(SMALL)
    return DualEncoder.new(settings.model, vocab_size=100, sep_token_id=3).eval()


@pytest.fixture(scope="module")
def targets(teacher: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random words, the teacher's own vectors of them, products near some of them."""
    root = tmp_path_factory.mktemp("targets")
    train_wordpiece(["a b c"], vocab_size=100).save_pretrained(root / "tokenizer")
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 8, TEXTS + VALID)
    texts = Ragged.from_rows([draw.integers(5, 100, n).tolist() for n in lengths])
    empty = np.zeros((TEXTS + VALID, 16), np.float32)
    blank = TeacherTargets(
        texts,
        empty,
        np.zeros((TEXTS + VALID, 100), np.int32),
        np.zeros((PRODUCTS, 16), np.float32),
        np.array([[q, q] for q in range(VALID)]),
        np.arange(VALID) % 2 == 0,
    )
    blank.save(root)
    whole = Distiller(
        load_settings(SMALL), root, root / "tokenizer", new_student(teacher, 2), CPU, 0, 1
    )
    vectors = whole._encode(np.arange(TEXTS + VALID))
    products = vectors[-PRODUCTS:] + 0.1 * draw.standard_normal((PRODUCTS, 16))
    products = (products / np.linalg.norm(products, axis=1, keepdims=True)).astype(np.float32)
    best = np.argsort(-(vectors @ products.T), axis=1)[:, :100].astype(np.int32)
    TeacherTargets(texts, vectors, best, products, blank.valid_pairs, blank.valid_new).save(root)
    return root


def distiller(
    settings: Settings, targets: Path, teacher: DualEncoder, rank: int = 0, world: int = 1
) -> Distiller:
    student = new_student(teacher, layers=1)
    made = Distiller(settings, targets, targets / "tokenizer", student, CPU, rank, 1)
    made.world = world
    return made


def with_distill(settings: Settings, **values: object) -> Settings:
    return settings.model_copy(update={"distill": settings.distill.model_copy(update=values)})


def test_a_student_comes_closer_to_its_teacher(
    settings: Settings, targets: Path, teacher: DualEncoder
) -> None:
    trainer = distiller(with_distill(settings, epochs=16), targets, teacher)
    before = trainer.validate()
    state = run(trainer, Rank(0, 1, CPU, lambda *_: None))
    after = state.validations[-1]
    assert 1 - after["cosine"] < 0.5 * (1 - before["cosine"])
    assert after["overlap_100"] > before["overlap_100"]
    assert [row["step"] for row in state.validations] == [*range(10, state.step + 1, 10)]


def test_a_run_resumed_in_the_middle_of_an_epoch_has_the_same_losses_and_weights(
    settings: Settings, targets: Path, teacher: DualEncoder
) -> None:
    kept: list[tuple[dict, Progress]] = []

    def save(tensors: Any, progress: Progress) -> None:
        if progress.step == 8:
            kept.append((copy.deepcopy(tensors), copy.deepcopy(progress)))
            raise KeyboardInterrupt

    undisturbed = distiller(settings, targets, teacher)
    whole = run(undisturbed, Rank(0, 1, CPU, lambda *_: None))
    with pytest.raises(KeyboardInterrupt):
        run(distiller(settings, targets, teacher), Rank(0, 1, CPU, save))
    trainer = distiller(settings, targets, teacher)
    resumed = run(trainer, Rank(0, 1, CPU, lambda *_: None, lambda: kept[0]))
    assert resumed.step == whole.step == 20
    for name in ("loss", "kl", "cosine", "grad_norm", "lr"):
        assert resumed.history[name].to_pylist() == whole.history[name].to_pylist(), name
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_every_text_is_seen_once_an_epoch_by_one_rank(
    settings: Settings, targets: Path, teacher: DualEncoder
) -> None:
    ranks = [distiller(settings, targets, teacher, rank, 3) for rank in range(3)]
    whole = TeacherTargets.open(targets).vectors[:TEXTS]
    seen = [trainer.batch(step).teacher.numpy() for step in range(5, 10) for trainer in ranks]
    got, expected = (np.sort(x.view("V64").ravel()) for x in (np.concatenate(seen), whole.copy()))
    assert np.array_equal(got, expected)


def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_the_whole_batch(
    settings: Settings, targets: Path, teacher: DualEncoder
) -> None:
    """What DDP averages."""

    def gradients(rank: int, world: int) -> dict[str, torch.Tensor]:
        trainer = distiller(settings, targets, teacher, rank, world)
        batch = trainer.batch(7)
        kl, distance = distillation_losses(
            trainer.forward(batch.text), batch.teacher, batch.best, batch.others, trainer.gamma
        )
        (kl.mean() + distance.mean()).backward()
        return {name: p.grad for name, p in trainer.model.named_parameters()}

    whole, ranks = gradients(0, 1), [gradients(rank, 4) for rank in range(4)]
    for name, grad in whole.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, grad, atol=1e-6, rtol=1e-3, msg=name)


def test_validation_measures_what_numpy_finds(targets: Path) -> None:
    held_out = HeldOutQueries(TeacherTargets.open(targets), most=30, seed=1)
    opened = TeacherTargets.open(targets)
    vectors = np.random.default_rng(2).standard_normal((30, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    teacher = opened.vectors[TEXTS + held_out.rows]

    def first(x: np.ndarray) -> list[set[int]]:
        return [set(row[:100].tolist()) for row in np.argsort(-(x @ opened.products.T), axis=1)]

    own, its = first(vectors), first(teacher)
    # Validation query q has one target, product q.
    hits, best = (
        np.array([q in found for q, found in zip(held_out.rows, lists, strict=True)])
        for lists in (own, its)
    )
    new = held_out.rows % 2 == 0
    got = held_out.measure(vectors)
    assert got["recall_100"] == pytest.approx(hits.mean())
    assert got["kept_100"] == pytest.approx(hits.mean() / best.mean())
    assert got["kept_100_new"] == pytest.approx(hits[new].mean() / best[new].mean())
    common = [len(a & b) / 100 for a, b in zip(own, its, strict=True)]
    assert got["overlap_100"] == pytest.approx(np.mean(common))
    assert got["cosine"] == pytest.approx((vectors * teacher).sum(axis=1).mean(), abs=1e-6)
    teachers = held_out.measure(teacher)
    assert teachers["kept_100"] == teachers["kept_100_new"] == teachers["overlap_100"] == 1


def test_a_batch_larger_than_the_texts_and_a_loss_that_is_not_finite_say_what_to_do(
    settings: Settings, targets: Path, teacher: DualEncoder
) -> None:
    with pytest.raises(UserError, match=r"--distill\.batch_size 500: there are 160 texts"):
        distiller(with_distill(settings, batch_size=500), targets, teacher)
    wild = distiller(with_distill(settings, lr=1e30, warmup_steps=0), targets, teacher)
    with pytest.raises(UserError, match=r"loss is not finite after step \d+.*--distill\.lr"):
        run(wild, Rank(0, 1, CPU, lambda *_: None))
