"""Students at their start, and what they learn, against numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from acebert.config import load_settings
from acebert.errors import UserError
from acebert.models.distillation import distillation_losses
from acebert.models.dual import DualEncoder
from acebert.models.encoder import HOT_QUERY, TextInputs
from acebert.models.student import new_student
from acebert.training.distill import student_layers


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_losses_are_those_worked_out_by_numpy() -> None:
    torch.manual_seed(0)
    v, teacher, best, others = unit(3, 8), unit(3, 8), unit(3, 4, 8), unit(5, 8)
    kl, distance = distillation_losses(v, teacher, best, others, gamma=7.0)
    for i in range(3):
        candidates = np.concatenate([best[i].numpy(), others.numpy()]).astype(float)

        def softmax(x: torch.Tensor, candidates: np.ndarray = candidates) -> np.ndarray:
            e = np.exp(7.0 * candidates @ x.numpy().astype(float))
            return e / e.sum()

        p, q = softmax(teacher[i]), softmax(v[i])
        assert float(kl[i]) == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)
        assert float(distance[i]) == pytest.approx(1 - float(v[i] @ teacher[i]), abs=1e-6)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    teacher = unit(3, 8)
    v = teacher.clone().requires_grad_()
    kl, distance = distillation_losses(v, teacher, unit(3, 4, 8), unit(5, 8), gamma=20.0)
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert distance.abs().max() < 1e-6
    assert v.grad.abs().max() < 1e-5


def test_students_are_as_deep_as_the_teacher_at_most_and_refused_before_any_is_trained(
    tmp_path: Path,
) -> None:
    argv = ["--model.width", "32", "--model.heads", "4", "--model.layers", "2"]
    settings = load_settings(argv)
    model = DualEncoder.new(
        settings.model, vocab_size=100, sep_token_id=3, patch_dim=8, pixel_side=7, seed=0
    )
    model.save(tmp_path)
    assert student_layers(settings, tmp_path) == (1, 2)
    deeper = load_settings([*argv, "--distill.layers", "[1, 3]"])
    with pytest.raises(UserError, match="has 2 layers"):
        student_layers(deeper, tmp_path)


@pytest.fixture
def text() -> TextInputs:
    ids = torch.randint(4, 100, (5, 7))
    mask = torch.arange(7) < torch.tensor([[7], [3], [5], [2], [6]])
    return TextInputs(ids, mask, torch.full_like(ids, HOT_QUERY))


def small(shared: bool = True, seed: int = 0) -> DualEncoder:
    settings = load_settings(
        [
            *["--model.width", "32", "--model.heads", "4", "--model.layers", "3"],
            *["--model.shared_towers", str(shared)],
        ]
    )
    return DualEncoder.new(
        settings.model, vocab_size=100, sep_token_id=3, patch_dim=8, pixel_side=7, seed=seed
    ).eval()


@pytest.mark.parametrize("shared", [True, False])
def test_a_student_with_all_layers_is_the_teacher(text: TextInputs, shared: bool) -> None:
    teacher = small(shared)
    if teacher.query_tower is not None:
        with torch.no_grad():
            teacher.query_tower.projection.weight.mul_(-1)  # the two sides differ
    student = new_student(teacher, layers=3).eval()
    with torch.inference_mode():
        assert torch.equal(student.encode_queries(text), teacher.encode_queries(text))
        assert torch.equal(student.encode_products(text), teacher.encode_products(text))


def test_a_shorter_student_has_the_teachers_first_layers_and_shares_no_tensor_with_it() -> None:
    teacher = small()
    student = new_student(teacher, layers=2)
    assert student.query_tower is not None
    own, start = student.query_tower.state_dict(), teacher.tower.state_dict()
    assert len(student.query_tower.encoder.encoder.layer) == 2
    for name, tensor in own.items():
        assert torch.equal(tensor, start[name]), name
        assert tensor.data_ptr() != start[name].data_ptr(), name


def test_a_narrower_students_words_lie_as_the_teachers_do(text: TextInputs) -> None:
    """Words on a plane keep their inner products on their two principal components."""
    teacher = small()
    words = teacher.tower.encoder.embeddings.word_embeddings.weight
    with torch.no_grad():
        words.copy_(torch.randn(100, 8) @ torch.randn(8, 32))
        words.sub_(words.mean(dim=0))
    student = new_student(teacher, layers=1, width=16)
    assert student.query_tower is not None
    own = student.query_tower.encoder.embeddings.word_embeddings.weight.detach()
    scale = (words.square().mean() / own.square().mean()).detach()
    assert float(scale) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(own @ own.T, (words @ words.T).detach() / 2, atol=1e-3, rtol=1e-3)
    assert student.encode_queries(text).shape == (5, 128)


@pytest.mark.parametrize(("layers", "width"), [(4, None), (0, None), (1, 12), (1, 64)])
def test_a_student_larger_than_its_teacher_is_refused(layers: int, width: int | None) -> None:
    with pytest.raises(UserError, match=r"--distill\.(layers|width)"):
        new_student(small(), layers, width)
