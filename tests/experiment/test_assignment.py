import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from acebert.config import ExperimentSettings, load_settings
from acebert.errors import UserError
from acebert.experiment.assignment import Experiment

USERS = [f"user-{i}" for i in range(40_000)]


def experiment(name: str = "one", **changed: object) -> Experiment:
    settings = ExperimentSettings(**{"name": name, "arms": ("a", "b", "c", "d"), **changed})
    made = Experiment.of(settings)
    assert made is not None
    return made


@pytest.mark.parametrize("shares", [(), (1, 1, 1, 1), (0.7, 0.1, 0.1, 0.1), (5, 3, 1, 1)])
def test_arms_get_their_shares_of_the_users(shares: tuple[float, ...]) -> None:
    dealt = experiment(shares=shares)
    counts = [sum(dealt.arm(user) == arm for user in USERS) for arm in dealt.arms]
    planned = np.array(shares or (1, 1, 1, 1)) / sum(shares or (1, 1, 1, 1))
    assert stats.chisquare(counts, planned * len(USERS)).pvalue > 0.001


@pytest.mark.parametrize("other", [experiment("two"), experiment(salt="pepper")])
def test_arms_of_two_experiments_are_independent(other: Experiment) -> None:
    one = experiment()
    table = np.zeros((4, 4), int)
    for user in USERS:
        table[one.arms.index(one.arm(user)), other.arms.index(other.arm(user))] += 1
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_another_process_deals_the_same_arms_whatever_its_hash_seed() -> None:
    code = (
        "from acebert.experiment.assignment import Experiment\n"
        "e = Experiment('one', tuple('abcd'), (.25,) * 4, '', 'split')\n"
        "print(''.join(e.arm(f'user-{i}') for i in range(500)))"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    told = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert told.strip() == "".join(experiment().arm(user) for user in USERS[:500])


def test_any_text_is_a_user_and_the_same_one_each_time() -> None:
    dealt = experiment()
    for user in ("ä", "\ud800", "\0", "x" * 10_000):
        assert dealt.arm(user) == dealt.arm(user)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--experiment.name", "x"], "two distinct names"),
        (["--experiment.name", "x", "--experiment.arms", "a,a"], "two distinct names"),
        (["--experiment.name", "x", "--experiment.arms", "../a,b"], "letters"),
        (
            ["--experiment.name", "x", "--experiment.arms", "a,b", "--experiment.shares", "1"],
            "each of 2",
        ),
        (
            ["--experiment.name=x", "--experiment.arms=a,b,c", "--experiment.design=interleave"],
            "two arms",
        ),
    ],
)
def test_an_experiment_that_cannot_run_is_refused_by_its_key(given: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=f"experiment.*{reason}"):
        load_settings(given)


def test_sides_are_the_control_and_each_treatment_as_often_on_either_side() -> None:
    experiment = Experiment("e", ("old", "a", "b"), (1 / 3,) * 3, "", "split")
    drawn = [experiment.sides(f"search-{i}") for i in range(4000)]
    assert experiment.sides("search-7") == drawn[7]
    pairs = [("old", "a"), ("a", "old"), ("old", "b"), ("b", "old")]
    counts = [drawn.count(pair) for pair in pairs]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > 0.001
