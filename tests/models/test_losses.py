"""Eq. 4-5 against numpy, blocks against the whole, two ranks against one process."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from acebert.config import ModelSettings
from acebert.data.tokens import Ragged
from acebert.models.domain import DomainClassifier, domain_loss, encoder_term
from acebert.models.dual import DualEncoder
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.models.false_negatives import FalseNegatives, false_negatives
from acebert.models.losses import semantic_matching_loss

W, d = 6, 8


def unit_vectors(seed: int = 0, n: int = W) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    v_q, v_p = torch.nn.functional.normalize(torch.randn(2, n, d), dim=-1)
    return v_q, v_p


def cells(mask: Tensor) -> FalseNegatives:
    """Of a bool matrix."""
    rows, columns = mask.numpy().nonzero()
    return FalseNegatives.at(rows, columns, len(mask))


def equation_5(
    v_q: Tensor,
    v_p: Tensor,
    gamma: float,
    q_mask: Tensor | None = None,
    p_mask: Tensor | None = None,
) -> float:
    """As printed; a masked pair is left out of the denominator of Eq. 4."""
    cosine = v_q.double().numpy() @ v_p.double().numpy().T
    total = 0.0
    for i in range(len(v_q)):
        products = [j for j in range(len(v_p)) if q_mask is None or not q_mask[i, j]]
        queries = [j for j in range(len(v_q)) if p_mask is None or not p_mask[i, j]]
        own = np.exp(gamma * cosine[i, i])
        total += np.log(own / sum(np.exp(gamma * cosine[i, j]) for j in products))
        total += np.log(own / sum(np.exp(gamma * cosine[j, i]) for j in queries))
    return -total / len(v_q)


@pytest.mark.parametrize("gamma", [1.0, 20.0, 100.0])
def test_loss_is_equation_5(gamma: float) -> None:
    v_q, v_p = unit_vectors()
    loss, metrics = semantic_matching_loss(v_q, v_p, gamma)
    assert loss.item() == pytest.approx(equation_5(v_q, v_p, gamma), rel=1e-5)
    assert metrics["loss"] == loss


def test_masked_pairs_leave_the_denominators() -> None:
    v_q, v_p = unit_vectors()
    q_mask, p_mask = torch.rand(2, W, W) < 0.4
    q_mask.fill_diagonal_(False)
    p_mask.fill_diagonal_(False)
    loss, metrics = semantic_matching_loss(
        v_q, v_p, 5.0, query_mask=cells(q_mask), product_mask=cells(p_mask)
    )
    assert loss.item() == pytest.approx(equation_5(v_q, v_p, 5.0, q_mask, p_mask), rel=1e-5)
    assert metrics["masked"].item() == pytest.approx(int(q_mask.sum()) / W)


def test_popularity_correction_subtracts_the_log_share_from_the_scores_of_products_alone() -> None:
    v_q, v_p = unit_vectors()
    share = torch.rand(W)
    loss, _ = semantic_matching_loss(v_q, v_p, 5.0, product_log_share=share.log())
    cosine = v_q.double().numpy() @ v_p.double().numpy().T
    of_products = np.exp(5 * cosine) / share.double().numpy()
    of_queries = np.exp(5 * cosine)
    expected = -np.log(of_products.diagonal() / of_products.sum(axis=1))
    expected -= np.log(of_queries.diagonal() / of_queries.sum(axis=0))
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)


def test_mined_products_are_further_negatives_of_queries_alone() -> None:
    v_q, v_p = unit_vectors()
    v_mined = unit_vectors(1)[0][:4]
    share = torch.rand(W + 4)
    mask = torch.zeros(W, W + 4, dtype=torch.bool)
    mask[2, W + 1] = mask[0, 3] = True
    loss, _ = semantic_matching_loss(
        v_q, v_p, 5.0, v_mined=v_mined, query_mask=cells(mask), product_log_share=share.log()
    )
    columns = torch.cat([v_p, v_mined]).double().numpy()
    of_products = np.exp(5 * v_q.double().numpy() @ columns.T) / share.double().numpy()
    of_products[mask.numpy()] = 0
    of_queries = np.exp(5 * v_q.double().numpy() @ v_p.double().numpy().T)
    own = of_products[:, :W].diagonal()
    expected = -np.log(own / of_products.sum(axis=1))
    expected -= np.log(of_queries.diagonal() / of_queries.sum(axis=0))
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_only_with_popularity_correction_do_scores_become_the_chance_of_a_click(
    corrected: bool,
) -> None:
    rng = np.random.default_rng(0)
    joint = rng.dirichlet(np.full(12, 5.0)).reshape(3, 4)  # p(query, product)
    of_product = joint.sum(axis=0)
    scores = torch.zeros(3, 4, requires_grad=True)  # one-hot queries: score = table entry
    optimizer = torch.optim.Adam([scores], lr=0.05)
    log_share = torch.from_numpy(np.log(of_product)).float()
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 400)
        query, product = np.divmod(rng.choice(12, size=512, p=joint.ravel()), 4)
        loss, _ = semantic_matching_loss(
            torch.eye(3)[query],
            scores.T[product],
            1.0,
            product_log_share=log_share[product] if corrected else None,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt = scores.detach().numpy()
    target = np.log(joint) - (0 if corrected else np.log(of_product))
    gap = (learnt - target) - (learnt - target).mean(axis=1, keepdims=True)
    assert np.abs(gap).max() < 0.05


def test_a_masked_pair_sends_no_gradient() -> None:
    v_q, v_p = (v.requires_grad_() for v in unit_vectors(n=2))
    everything_else = cells(~torch.eye(2, dtype=torch.bool))
    loss, _ = semantic_matching_loss(
        v_q, v_p, 20.0, query_mask=everything_else, product_mask=everything_else
    )
    loss.backward()
    assert loss.item() == 0
    assert not v_q.grad.any()  # type: ignore[union-attr]
    assert not v_p.grad.any()  # type: ignore[union-attr]


def test_accuracy_counts_queries_whose_own_product_is_on_top_of_those_not_masked() -> None:
    v_p = torch.eye(3, d)
    v_q = torch.stack([v_p[0], 0.6 * v_p[1] + 0.8 * v_p[2], v_p[2]])
    _, metrics = semantic_matching_loss(v_q, v_p, 20.0)
    assert metrics["accuracy"].item() == pytest.approx(2 / 3)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 2] = True
    _, metrics = semantic_matching_loss(v_q, v_p, 20.0, query_mask=cells(mask))
    assert metrics["accuracy"] == 1


def test_scores_are_fp32_under_autocast() -> None:
    v_q, v_p = unit_vectors()
    exact, _ = semantic_matching_loss(v_q, v_p, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = semantic_matching_loss(v_q, v_p, 20.0)
    assert torch.equal(loss, exact)


def test_gamma_gets_the_gradient_of_equation_5() -> None:
    v_q, v_p = unit_vectors()
    gamma = torch.tensor(3.0, requires_grad=True)
    semantic_matching_loss(v_q, v_p, gamma)[0].backward()
    slope = (equation_5(v_q, v_p, 3.0 + 1e-4) - equation_5(v_q, v_p, 3.0 - 1e-4)) / 2e-4
    assert gamma.grad is not None
    assert gamma.grad.item() == pytest.approx(slope, rel=1e-4)


def test_a_mask_of_other_rows_is_refused() -> None:
    v_q, v_p = unit_vectors()
    with pytest.raises(ValueError, match="a mask of 5 rows for 6"):
        semantic_matching_loss(v_q, v_p, 1.0, query_mask=cells(torch.zeros(5, W)))


@pytest.mark.parametrize("block", [1, 2 * 40 + 1, 7 * 40])
def test_scores_made_in_blocks_give_the_whole_matrixs_loss_and_gradients(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows one by one, in twos, and in sevens with a last block of five."""
    masks = torch.rand(2, 40, 40) < 0.3
    masks[:, range(40), range(40)] = False
    log_share = torch.randn(40)

    def run() -> list[Tensor]:
        v_q, v_p = (v.requires_grad_() for v in unit_vectors(n=40))
        gamma = torch.tensor(9.0, requires_grad=True)
        loss, metrics = semantic_matching_loss(
            v_q,
            v_p,
            gamma,
            query_mask=cells(masks[0]),
            product_mask=cells(masks[1]),
            product_log_share=log_share,
        )
        return [loss, metrics["accuracy"], *torch.autograd.grad(loss, [v_q, v_p, gamma])]

    whole = run()
    monkeypatch.setattr("acebert.models.losses.BLOCK", block)
    torch.testing.assert_close(run(), whole)


# ---- two ranks

CASES = [("minimax", "log", True), ("confusion", "keep", True), ("minimax", "batch", False)]
QUERY = np.array([0, 1, 2, 3, 0, 4, 5, 2])  # 0 and 2 stand on both ranks
PRODUCT = np.array([0, 1, 2, 3, 4, 1, 5, 2])  # 1 and 2 as well; row 7 repeats row 2
CLICKED = Ragged.from_rows([[], [4], [], [5], [], [0]])  # products of each query


def batch(rows: slice) -> tuple[TextInputs, TextInputs, ImageInputs]:
    """Rows of a batch of 8. Products 0-5 differ by one or two words (hard negatives); on the
    second rank no product has an image; each rank pads to its own longest text."""
    rng = np.random.default_rng(0)
    words = rng.integers(4, 60, (6, 7))
    titles = np.tile(rng.integers(4, 60, 9), (6, 1))
    titles[:, 4] = rng.integers(4, 60, 6)
    patches, pixels = rng.normal(size=(8, 16, 8)), rng.integers(0, 256, (8, 14, 14, 3))

    def text(ids: NDArray[np.int64], lengths: NDArray[np.int64], segment: int) -> TextInputs:
        L = lengths.max()
        mask = np.arange(L)[None] < lengths[:, None]
        return TextInputs(
            torch.tensor(ids[:, :L] * mask),
            torch.tensor(mask),
            torch.full((len(ids), L), segment),
        )

    q, p = QUERY[rows], PRODUCT[rows]
    image = ImageInputs(
        torch.tensor([True, True, False, True] + 4 * [False])[rows],
        torch.tensor(patches[rows]).float(),
        torch.tensor(pixels[rows]).to(torch.uint8),
    )
    return text(words[q], 2 + q % 5, 1), text(titles[p], 5 + p % 4, 0), image


def train_a_little(case: tuple[Any, Any, bool], rows: slice, wrap: Any) -> dict[str, Tensor]:
    """Two encoder steps, one of D, twice over; gradients and weights after them."""
    form, negatives, shared = case
    settings = ModelSettings(
        backbone=None, layers=2, width=16, heads=2, embedding_dim=d, dropout=0.0,
        shared_towers=shared,
    )  # fmt: skip
    model = DualEncoder.new(
        settings, vocab_size=60, sep_token_id=3, patch_dim=8, pixel_side=14, gamma=8.0,
        gamma_learned=True,
    )  # fmt: skip
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    domain = DomainClassifier(d, 12)
    encoders = wrap(model)
    sgd, sgd_D = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, domain))
    masks = false_negatives(QUERY, PRODUCT, negatives, CLICKED, rows)
    seen: dict[str, Tensor] = {}
    for turn in range(2):
        for step in range(2):
            v_q, v_p = encoders(*batch(rows))
            main, _ = semantic_matching_loss(
                v_q, v_p, model.gamma, query_mask=masks[0], product_mask=masks[1]
            )
            loss = main + 0.7 * encoder_term(form, domain, v_q, v_p)
            sgd.zero_grad()
            frozen = {name: p.detach().clone() for name, p in domain.named_parameters()}
            loss.backward()
            sgd.step()
            assert all(torch.equal(p, frozen[name]) for name, p in domain.named_parameters())
            seen[f"loss.{turn}.{step}"] = loss.detach().reshape(1)
        loss = domain_loss(domain, v_q, v_p)
        sgd_D.zero_grad()
        loss.backward()
        if dist.is_initialized():  # as Finetuner.domain_step
            for parameter in domain.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        sgd_D.step()
        seen[f"domain_loss.{turn}"] = loss.detach().reshape(1)
    for name, p in [*model.named_parameters(), *domain.named_parameters()]:
        assert p.grad is not None, name
        seen[f"grad.{name}"] = p.grad.clone()
        seen[f"weight.{name}"] = p.detach().clone()
    return seen


def one_rank(case: tuple[Any, Any, bool], rank: int) -> dict[str, Tensor]:
    """What `two_ranks` runs."""
    return train_a_little(case, slice(4 * rank, 4 * rank + 4), DistributedDataParallel)


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_ranks_equal_one_process_on_the_whole_batch(
    case: int, two_ranks: list[list[dict[str, Tensor]]]
) -> None:
    """Loss, every gradient and every weight, γ and D included."""
    whole = train_a_little(CASES[case], slice(0, 8), lambda module: module)
    first, second = two_ranks[case]
    for name, expected in whole.items():
        if "loss" in name:  # each rank has its rows' mean
            torch.testing.assert_close((first[name] + second[name]) / 2, expected, msg=name)
            continue
        assert expected.any(), f"{name} says nothing"
        torch.testing.assert_close(first[name], expected, atol=2e-6, rtol=1e-3, msg=name)
        assert torch.equal(first[name], second[name])
