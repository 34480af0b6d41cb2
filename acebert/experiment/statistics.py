"""Intervals and tests of an online experiment. Users were drawn, so users are the sample.

A metric of an arm is a ratio of sums over its users, R = Σ x_u / Σ y_u: clicks over products shown,
revenue over searches. A user's searches are alike, so their number is no sample size: the delta
method takes Var(R) = Var(x_u − R·y_u) / (U·ȳ²) over the U users (Deng, Knoblich and Lu, Applying
the Delta Method in Metric Analytics, KDD 2018). A lift R_t / R_c − 1 has its interval on the scale
of the logarithm, where it is nearly normal and cannot fall below −1. Quantiles are Student's, with
the smaller arm's degrees of freedom: the votes of a few reviewers are an experiment too.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
POWER = 0.8
MISMATCH = 0.001
"""p below which the arms' users are not dealt as planned: strict, since it is looked at often and
voids the whole experiment (Fabijan et al., KDD 2019, use 0.0005)"""
BUYERS = 100
"""of an arm, with fewer of which a lift in revenue has no interval: few purchases of very different
prices make intervals that miss the truth up to twice as often as they should"""
ALIKE = 1e-12  # relative spread that is rounding


@dataclass(frozen=True)
class PerUser:
    """A metric of one arm as sums by user."""

    numerator: NDArray[np.float64]
    """x, e.g. clicks [U]"""
    denominator: NDArray[np.float64]
    """y, e.g. products shown, not negative [U]"""

    @property
    def value(self) -> float:
        """R; NaN where nothing was shown."""
        total = self.denominator.sum()
        return float(self.numerator.sum() / total) if total > 0 else float("nan")

    @property
    def standard_error(self) -> float:
        """Of R, by the delta method; NaN where the users tell nothing of their spread: there are
        fewer than two, or all are alike."""
        if self.freedom < 1 or not self.denominator.sum() > 0:
            return float("nan")
        residual = self.numerator - self.value * self.denominator
        spread = residual.std(ddof=1)
        if spread <= ALIKE * np.abs(self.numerator).mean():
            return float("nan")
        return float(spread / (np.sqrt(len(residual)) * self.denominator.mean()))

    @property
    def freedom(self) -> int:
        """Degrees of freedom, U − 1."""
        return len(self.numerator) - 1


@dataclass(frozen=True)
class Effect:
    """An estimate with its 95 % interval and the two-sided p of no effect; NaN: no such number."""

    value: float
    low: float
    high: float
    p: float
    error: float
    """standard error; of a lift, that of its logarithm"""

    @property
    def found(self) -> bool:
        """The interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def unclaimed(self) -> "Effect":
        """The estimate alone."""
        unknown = float("nan")
        return replace(self, low=unknown, high=unknown, p=unknown, error=unknown)


def lift(treatment: PerUser, control: PerUser) -> Effect:
    """R_t / R_c − 1. NaN where an arm has no users, or a value of 0, whose logarithm is none."""
    if not (treatment.value > 0 and control.value > 0):
        return Effect(*[float("nan")] * 5)
    log_ratio = float(np.log(treatment.value / control.value))
    error = float(
        np.hypot(treatment.standard_error / treatment.value, control.standard_error / control.value)
    )
    found = _effect(log_ratio, error, min(treatment.freedom, control.freedom))
    value, low, high = np.expm1([found.value, found.low, found.high]).tolist()
    return Effect(value, low, high, found.p, found.error)


def needed(measured: Effect, size: float) -> float:
    """Times the data that `measured` is of, at which a lift of `size`, above -1 and not 0, is found
    with 80 % power. What was measured gives the spread of users alone: a lift that came out large
    by luck would promise that little data will do."""
    quantiles = float(stats.norm.ppf(0.5 + LEVEL / 2) + stats.norm.ppf(POWER))
    return float((quantiles * measured.error / np.log1p(size)) ** 2)


def preference(score: PerUser) -> Effect:
    """How much more often B wins than A, of what is decided: (wins_B − wins_A) / decided, in
    [−1, 1]; of interleaved searches, or of votes.

    `score`: wins of B less wins of A, over decided ones, by user.
    """
    return _effect(score.value, score.standard_error, score.freedom)


def sign_test(score: NDArray[np.float64]) -> float:
    """Exact two-sided p that a user is as likely to prefer A as B, from each user's sign [U]; users
    without a preference do not count. 1 where nobody has one."""
    for_b, for_a = int((score > 0).sum()), int((score < 0).sum())
    return float(stats.binomtest(for_b, for_a + for_b).pvalue) if for_a + for_b else 1.0


def sample_ratio(users: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """Chi-square p of the users by arm [A] under the planned shares [A]; 1 with one arm or none to
    count. Below MISMATCH something loses users of one arm, and no lift can be believed."""
    if len(users) < 2 or not users.sum():
        return 1.0
    return float(stats.chisquare(users, shares / shares.sum() * users.sum()).pvalue)


def _effect(value: float, error: float, freedom: int) -> Effect:
    """Student's interval and test of a value with this standard error."""
    if not error > 0:
        return Effect(value, *[float("nan")] * 4)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Effect(value, value - half, value + half, p, error)
