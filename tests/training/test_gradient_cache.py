"""Cached gradients against those of one graph over the whole batch, alone and on two ranks."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.models.domain import DomainClassifier, encoder_term
from acebert.models.dual import DualEncoder
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.models.false_negatives import FalseNegatives
from acebert.models.losses import semantic_matching_loss
from acebert.training.finetuner import Finetuner
from acebert.training.pairs import Side, TrainBatch

W, GAMMA = 12, 8.0
OF_DOMAIN = "domain classifier's"


def recipe(**values: Any) -> Settings:
    """`train`, `model` and `adversary` leaves by their names."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"backbone": None, "layers": 2, "width": 16, "heads": 2, "embedding_dim": 8,
                  "dropout": 0.0},
        "loss": {"gamma": GAMMA, "gamma_learned": True},
        "adversary": {"form": "confusion", "weight": 0.7, "hidden": 6},
        "train": {"batch_size": W, "precision": "fp32", "max_grad_norm": 1e9, "warmup_steps": 0},
    }  # fmt: skip
    for name, value in values.items():
        (section,) = [s for s in tree if name in type(getattr(Settings(), s)).model_fields]
        tree[section][name] = value
    return Settings(**tree)


def new_model(settings: Settings) -> DualEncoder:
    model = DualEncoder.new(
        settings.model, vocab_size=60, sep_token_id=3, patch_dim=8, pixel_side=14, gamma=GAMMA,
        gamma_learned=True,
    )  # fmt: skip
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def pairs(rows: slice, settings: Settings) -> TrainBatch:
    """Pairs `rows` of twelve: six queries, nine products (each with its list), one cell masked;
    with mined products for each pair one of them is masked; with the popularity correction every
    product has a share of its own."""
    H = settings.loss.hard_negatives
    rng = np.random.default_rng(0)
    words = torch.from_numpy(rng.integers(4, 60, (9, 9)))
    query = np.array([0, 1, 2, 3, 4, 5, 0, 1, 5, 3, 2, 4])[rows]
    all_products = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 8])
    all_mined = np.random.default_rng(1).integers(0, 9, (12, H))
    product, mined = all_products[rows], all_mined[rows].ravel()
    columns = np.concatenate([all_products, all_mined.ravel()])  # pairs' own, then mined by pair
    log_share = torch.linspace(-5, -1, 9)[columns]
    patches = torch.from_numpy(rng.normal(size=(9, 16, 8))).float()
    pixels = torch.from_numpy(rng.integers(0, 256, (9, 14, 14, 3))).to(torch.uint8)

    def side(ids: np.ndarray, lengths: np.ndarray, with_image: bool) -> Side:
        distinct, pair_row = np.unique(ids, return_inverse=True)
        tokens = lengths[distinct]  # ascending, as `PairBatches` has them
        mask = torch.from_numpy(np.arange(tokens.max()) < tokens[:, None])
        text = TextInputs(words[distinct][:, : tokens.max()] * mask, mask, mask.long())
        has_image = distinct % 3 > 0 if with_image else np.zeros(len(distinct), bool)
        image = ImageInputs(torch.from_numpy(has_image), patches[distinct], pixels[distinct])
        rows = torch.from_numpy(pair_row)
        return Side(text, image if with_image else None, tokens, has_image, rows)

    own = np.arange(W)[rows]
    cells = [(int(np.flatnonzero(own == 3)[0]), 9)] if 3 in own else []
    at = np.array(cells, np.int64).reshape(-1, 2)
    mask = FalseNegatives.at(at[:, 0], at[:, 1], len(own))
    wide = (
        at if not H else np.concatenate([at, at + np.array([0, W + H])])
    )  # of the pair behind the tenth
    query_mask = FalseNegatives.at(wide[:, 0], wide[:, 1], len(own))
    lengths = np.array([2, 3, 3, 4, 5, 6, 6, 7, 9])
    products = side(np.concatenate([product, mined]), lengths, True)
    own_row, mined_row = products.pair_row.split([len(product), len(mined)])
    return TrainBatch(
        side(query, lengths, False),
        replace(products, pair_row=own_row),
        query_mask,
        mask,
        log_share if settings.loss.popularity_correction else None,
        mined_row if H else None,
    )


def gradients(
    settings: Settings, batch: TrainBatch, rank: int = 0, world: int = 1, device: str = "cpu"
) -> dict[str, Tensor]:
    """Of the second encoder step, by parameter; its loss; and the bytes that DDP sent in it. Of
    two steps of the domain classifier after it, the gradients of the first and what it then is."""
    tuner = Finetuner(settings, new_model(settings), torch.device(device), rank, world)
    seen: dict[str, Tensor] = {}
    sent = 0

    def count(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal sent
        sent += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    if isinstance(tuner.parallel, DistributedDataParallel):
        tuner.parallel.register_comm_hook(None, count)

    def keep(*_: object) -> None:
        for name, parameter in tuner.model.named_parameters():
            assert parameter.grad is not None, name
            seen[name] = parameter.grad.clone()

    tuner.optimizer.register_step_pre_hook(keep)
    for step in (3, 4):  # DDP deals its buckets anew before the second
        sent = 0
        metrics, v_q, v_p = tuner.encoder_step(
            batch.to(tuner.device), step, share=1.0
        )  # a learning rate of 0
    for _ in range(2):
        tuner.domain_step(v_q, v_p)
        for name, parameter in tuner.domain.named_parameters():
            assert parameter.grad is not None
            seen.setdefault(f"{OF_DOMAIN} gradient {name}", parameter.grad.clone())
    seen |= {f"{OF_DOMAIN} {name}": tensor for name, tensor in tuner.domain.state_dict().items()}
    return {"loss": metrics["loss"].clone(), "sent": torch.tensor(sent), **seen}


def of_encoders(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients among these."""
    return {
        name: tensor
        for name, tensor in seen.items()
        if name not in ("loss", "sent") and not name.startswith(OF_DOMAIN)
    }


def plain_twin(
    settings: Settings, batch: TrainBatch, of_ranks: Sequence[TrainBatch] = ()
) -> dict[str, Tensor]:
    """One graph over all parts (of the ranks' shares of the batch), each with its own random
    numbers, and one backward."""
    model = new_model(settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        domain = DomainClassifier(settings.model.embedding_dim, settings.adversary.hidden)
    sides, v_mined = [], None
    for rank, own in enumerate(of_ranks or [batch]):
        embeddings = []
        for i, part in enumerate(own.parts(settings.train.micro_batch)):
            torch.manual_seed(hash((settings.seed, 4, rank, i)))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "bf16"):
                embeddings.append(model(*part))
        v_q, v_p = (torch.cat(side) for side in zip(*embeddings, strict=True))
        v_mined = None if own.mined_row is None else v_p[own.mined_row]
        sides.append((v_q[own.query.pair_row], v_p[own.product.pair_row]))
    v_q, v_p = (torch.cat(side) for side in zip(*sides, strict=True))
    given = {
        "query_mask": batch.query_mask,
        "product_mask": batch.product_mask,
        "product_log_share": batch.product_log_share,
    }
    loss, metrics = semantic_matching_loss(v_q, v_p, model.gamma, v_mined=v_mined, **given)
    for dims in settings.loss.matryoshka_dims:
        short_q, short_p, short_mined = (
            None if v is None else v[:, :dims] / v[:, :dims].norm(dim=1, keepdim=True)
            for v in (v_q, v_p, v_mined)
        )
        loss = (
            loss
            + semantic_matching_loss(short_q, short_p, model.gamma, v_mined=short_mined, **given)[0]
        )
    term = encoder_term("confusion", domain, v_q, v_p)
    (loss + settings.adversary.weight * term).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": metrics["loss"], **grads}


@pytest.mark.parametrize(
    "values",
    [
        {"micro_batch": 2},
        {"micro_batch": 4, "dropout": 0.3},
        {"micro_batch": 1, "shared_towers": False},
        {"micro_batch": None, "dropout": 0.3},
        {"micro_batch": 4, "precision": "bf16", "dropout": 0.3},
        {"micro_batch": 2, "hard_negatives": 2, "matryoshka_dims": (4, 2)},
        {"micro_batch": None, "hard_negatives": 2, "matryoshka_dims": (4, 2)},
        {"micro_batch": 2, "hard_negatives": 2, "popularity_correction": True},
    ],
    ids=str,
)
def test_cached_gradients_are_those_of_one_graph(values: dict[str, Any]) -> None:
    """With the adversary, a learned γ, masks, rows shared by pairs and sides of unequal size."""
    settings = recipe(**values)
    batch = pairs(slice(0, W), settings)
    got, expected = (f(settings, batch) for f in (gradients, plain_twin))
    assert of_encoders(got).keys() == of_encoders(expected).keys()
    # bf16: the parts' gradients are summed in fp32 here, in bf16 by the one graph.
    bf16 = settings.train.precision == "bf16"
    atol, rtol = (2e-2, 5e-2) if bf16 else (1e-5, 1e-3)
    for name, gradient in expected.items():
        assert gradient.any(), f"{name} says nothing"
        torch.testing.assert_close(got[name], gradient, atol=atol, rtol=rtol, msg=name)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_parts_without_dropout_give_the_whole_batchs_gradients(device: str) -> None:
    batch = pairs(slice(0, W), recipe())
    whole, cached = (gradients(recipe(micro_batch=m), batch, device=device) for m in (None, 2))
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-3)


def test_a_row_that_pairs_share_has_the_sum_of_their_gradients() -> None:
    """Against a batch with a row for each pair."""
    batch = pairs(slice(0, W), recipe())

    def repeated(side: Side) -> Side:
        at = side.pair_row
        image = None if side.image is None else side.image.rows(at)
        return Side(side.text.rows(at), image, side.tokens[at], side.has_image[at], torch.arange(W))

    plain = TrainBatch(
        repeated(batch.query), repeated(batch.product), batch.query_mask, batch.product_mask, None
    )
    assert len(batch.query) < len(plain.query) == W
    torch.testing.assert_close(
        gradients(recipe(), batch), gradients(recipe(), plain), atol=1e-5, rtol=1e-3
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_encoders_draw_the_same_dropout_with_and_without_a_graph() -> None:
    """Which are two graphs to the compiler; a part is encoded once by each."""
    settings = recipe(dropout=0.3)
    encoders = torch.compile(new_model(settings))
    (part,) = pairs(slice(0, W), settings).parts(None)

    def encode(seed: int, grad: bool) -> list[Tensor]:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            return [v.detach().clone() for v in encoders(*part)]

    kept = encode(1, grad=False)
    torch.testing.assert_close(encode(1, grad=True), kept, atol=1e-5, rtol=1e-4)
    for other, v in zip(encode(2, grad=False), kept, strict=True):
        assert (other - v).abs().max() > 0.1


# ---- two ranks

EXACT: list[dict[str, Any]] = [
    {"micro_batch": 2},
    {"micro_batch": 2, "shared_towers": False},
    {"micro_batch": 2, "hard_negatives": 2, "matryoshka_dims": (4,)},
    {"micro_batch": None, "hard_negatives": 2},
    {"micro_batch": 6, "hard_negatives": 2},  # as many as a rank has pairs: fewer than rows
    {"micro_batch": 2, "hard_negatives": 2, "popularity_correction": True},
    {"micro_batch": None, "popularity_correction": True},
]
DRAWN: list[dict[str, Any]] = [
    {"micro_batch": 2, "dropout": 0.3},
    {"micro_batch": 4, "dropout": 0.3, "precision": "bf16"},
]
CASES = [*EXACT, *DRAWN]


def share(rank: int, settings: Settings) -> TrainBatch:
    return pairs(slice(6 * rank, 6 * rank + 6), settings)


def one_rank(case: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """What `two_ranks` runs."""
    settings = recipe(**case)
    return gradients(settings, share(rank, settings), rank, world=2)


@pytest.mark.parametrize("case", range(len(EXACT), len(CASES)), ids=str)
def test_two_ranks_that_cache_have_the_gradients_of_one_graph_with_each_ranks_own_dropout(
    case: int, two_ranks: list[list[dict[str, Tensor]]]
) -> None:
    settings = recipe(**CASES[case])
    expected = plain_twin(
        settings, pairs(slice(0, W), settings), [share(rank, settings) for rank in (0, 1)]
    )
    first, second = two_ranks[case]
    atol, rtol = (2e-2, 5e-2) if settings.train.precision == "bf16" else (1e-5, 1e-3)
    loss = (first["loss"] + second["loss"]) / 2
    torch.testing.assert_close(loss, expected["loss"], atol=atol, rtol=rtol)
    for name, gradient in of_encoders(expected).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], gradient, atol=atol, rtol=rtol, msg=name)


@pytest.mark.parametrize("case", range(len(EXACT)), ids=str)
def test_two_ranks_that_cache_have_the_whole_batchs_gradients_by_one_all_reduce(
    case: int, two_ranks: list[list[dict[str, Tensor]]]
) -> None:
    whole = recipe(**{**CASES[case], "micro_batch": None})
    expected = gradients(whole, pairs(slice(0, W), whole))
    first, second = two_ranks[case]
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, expected["loss"])
    for name, gradient in of_encoders(expected).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    size = sum(gradient.nbytes for gradient in of_encoders(expected).values())
    assert first["sent"] == second["sent"] == size


@pytest.mark.parametrize("case", range(len(EXACT)), ids=str)
def test_two_ranks_have_one_domain_classifier_that_of_the_whole_batch(
    case: int, two_ranks: list[list[dict[str, Tensor]]]
) -> None:
    whole = recipe(**{**CASES[case], "micro_batch": None})
    expected = gradients(whole, pairs(slice(0, W), whole))
    first, second = two_ranks[case]
    names = [name for name in expected if name.startswith(OF_DOMAIN)]
    assert len(names) == 8  # two layers' weights and biases, and their gradients
    for name in names:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)
