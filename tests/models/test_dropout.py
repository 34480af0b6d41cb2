"""Our dropout against what dropout is, and against torch's where it is torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acebert.models.dropout import Dropout, dropout
from acebert.models.encoder import load_backbone


def ones(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(n, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_p_is_dropped_wherever_it_stands_and_the_mean_stays(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    n = 400_002  # no multiple of four
    y = dropout(ones(n, dtype), p).detach()
    for place in range(4):  # in the 64 bits of a draw
        dropped = (y[place::4] == 0).double().mean()
        assert dropped.item() == pytest.approx(p, abs=5 * (p * (1 - p) / (n / 4)) ** 0.5)
    assert len(y.unique()) == 2
    error = 5 * (p / (1 - p) / n) ** 0.5
    assert y.double().mean().item() == pytest.approx(
        1, abs=error + 2**-8 * (dtype != torch.float32)
    )


def test_neighbours_drop_out_independently() -> None:
    torch.manual_seed(0)
    kept = (dropout(ones(400_000), 0.5) > 0).double()
    for lag in (1, 2, 3, 4, 7):
        together = (kept[lag:] * kept[:-lag]).mean().item()
        assert together == pytest.approx(0.25, abs=0.005)


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.randn(7, 5, 3, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, y)
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_one_seed_draws_the_same_and_another_does_not() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(ones(1000), 0.3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_at_the_ends_it_is_torchs(p: float) -> None:
    x = torch.randn(100)
    assert torch.equal(dropout(x, p), F.dropout(x, p))


def test_a_module_that_does_not_train_changes_nothing() -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_every_dropout_of_the_encoder_is_ours() -> None:
    encoder = load_backbone(
        None, layers=2, width=16, heads=2, dropout=0.1, vocab_size=50, sep_token_id=3
    )
    kinds = [type(module) for module in encoder.modules() if isinstance(module, nn.Dropout)]
    assert len(kinds) == 1 + 3 * 2
    assert set(kinds) == {Dropout}
