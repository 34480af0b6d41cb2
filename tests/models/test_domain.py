"""Eq. 6-8 against numpy, and who gets a gradient from what."""

from typing import Literal

import numpy as np
import pytest
import torch

from acebert.models.domain import DomainClassifier, domain_accuracy, domain_loss, encoder_term

d, b = 8, 5
Pair = tuple[torch.Tensor, torch.Tensor]
Form = Literal["minimax", "confusion"]


@pytest.fixture
def domain() -> DomainClassifier:
    torch.manual_seed(0)
    return DomainClassifier(d, 16)


@pytest.fixture
def v() -> Pair:
    torch.manual_seed(1)
    v_q, v_p = torch.nn.functional.normalize(torch.randn(2, b, d), dim=-1)
    return v_q.requires_grad_(), v_p.requires_grad_()


def probability(domain: DomainClassifier, v: torch.Tensor) -> np.ndarray:
    """D(v) written out in numpy."""
    first, second = domain.layers[0], domain.layers[2]
    x = v.detach().numpy().astype(np.float64)
    hidden = x @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    logit = hidden @ second.weight.detach().numpy()[0] + second.bias.detach().numpy()[0]
    return 1 / (1 + np.exp(-logit))


def test_domain_loss_is_equation_6(domain: DomainClassifier, v: Pair) -> None:
    D_q, D_p = probability(domain, v[0]), probability(domain, v[1])
    expected = -1 / b * sum(np.log(D_q) + np.log(1 - D_p))
    assert domain_loss(domain, *v).item() == pytest.approx(expected, rel=1e-5)


def test_minimax_is_minus_equation_6(domain: DomainClassifier, v: Pair) -> None:
    D_q, D_p = probability(domain, v[0]), probability(domain, v[1])
    expected = 1 / b * sum(np.log(D_q) + np.log(1 - D_p))
    assert encoder_term("minimax", domain, *v).item() == pytest.approx(expected, rel=1e-5)


def test_confusion_is_the_cross_entropy_to_one_half(domain: DomainClassifier, v: Pair) -> None:
    D = np.concatenate([probability(domain, v[0]), probability(domain, v[1])])
    expected = -1 / b * sum(0.5 * np.log(D) + 0.5 * np.log(1 - D))
    assert encoder_term("confusion", domain, *v).item() == pytest.approx(expected, rel=1e-5)


def test_confusion_is_least_where_the_classifier_cannot_tell(
    domain: DomainClassifier, v: Pair
) -> None:
    assert encoder_term("confusion", domain, *v).item() > 2 * np.log(2)
    for parameter in domain.parameters():
        torch.nn.init.zeros_(parameter)
    assert encoder_term("confusion", domain, *v).item() == pytest.approx(2 * np.log(2))


def test_accuracy_counts_queries_above_and_products_below_one_half(
    domain: DomainClassifier, v: Pair
) -> None:
    D_q, D_p = probability(domain, v[0]), probability(domain, v[1])
    expected = np.mean(np.concatenate([D_q > 0.5, D_p <= 0.5]))
    assert domain_accuracy(domain, *v).item() == pytest.approx(expected)


@pytest.mark.parametrize("form", ["minimax", "confusion"])
def test_encoder_term_reaches_the_embeddings_and_not_the_classifier(
    form: Form, domain: DomainClassifier, v: Pair
) -> None:
    encoder_term(form, domain, *v).backward()
    assert all(parameter.grad is None for parameter in domain.parameters())
    assert all(parameter.requires_grad for parameter in domain.parameters())
    assert v[0].grad.norm(dim=1).min() > 0
    assert v[1].grad.norm(dim=1).min() > 0


def test_domain_loss_reaches_the_classifier_and_not_the_embeddings(
    domain: DomainClassifier, v: Pair
) -> None:
    domain_loss(domain, *v).backward()
    assert v[0].grad is None
    assert v[1].grad is None
    assert all(parameter.grad.any() for parameter in domain.parameters())


def test_the_encoders_gradient_is_the_one_that_a_live_classifier_would_send(
    domain: DomainClassifier, v: Pair
) -> None:
    encoder_term("minimax", domain, *v).backward()
    twins = [x.detach().clone().requires_grad_() for x in v]
    logit_q, logit_p = domain(twins[0]), domain(twins[1])
    sigmoid = torch.nn.functional.logsigmoid
    (sigmoid(logit_q).mean() + sigmoid(-logit_p).mean()).backward()
    for got, twin in zip(v, twins, strict=True):
        torch.testing.assert_close(got.grad, twin.grad)


def test_the_game_separates_and_confuses(domain: DomainClassifier) -> None:
    """D's steps learn two clouds apart; the embeddings' steps undo it, in either form."""
    torch.manual_seed(2)
    clouds = torch.randn(2, 64, d) * 0.3
    clouds[0, :, 0] += 1
    D = torch.optim.Adam(domain.parameters(), lr=0.02)
    for _ in range(100):
        D.zero_grad()
        domain_loss(domain, clouds[0], clouds[1]).backward()
        D.step()
    assert domain_accuracy(domain, clouds[0], clouds[1]) > 0.9
    before = domain_loss(domain, clouds[0], clouds[1]).item()
    for form in ("minimax", "confusion"):
        x = clouds.clone().requires_grad_()
        step = torch.optim.SGD([x], lr=1.0)
        for _ in range(30):
            step.zero_grad()
            encoder_term(form, domain, x[0], x[1]).backward()
            step.step()
        assert domain_loss(domain, x[0], x[1]).item() > before + 0.1


def test_logits_are_fp32_under_autocast(domain: DomainClassifier, v: Pair) -> None:
    exact = domain(v[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(domain(v[0]), exact)
