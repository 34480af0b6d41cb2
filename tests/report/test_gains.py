"""What may be claimed: relative gains against hand-made numbers, and nothing of equal rows."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from acebert.config import load_settings
from acebert.evaluation.significance import (
    Interval,
    Ratios,
    difference,
    mean_of_queries,
    relative_gain,
)
from acebert.evaluation.tables import Row
from acebert.report import words
from acebert.report.gains import Comparison, Gain, comparisons, relative, value_of
from acebert.report.parts import TABLE_1, TABLE_3, TABLE_4, Step, Table
from acebert.report.rows import FASHIONBERT, RIVAL, ZERO_SHOT


def test_a_relative_gain_is_the_ratio_and_its_interval_scipys() -> None:
    rng = np.random.default_rng(0)
    b = rng.uniform(0.2, 0.8, 400)
    a = b * 1.1 + rng.normal(0, 0.1, 400)
    found, _ = relative_gain(mean_of_queries(a), mean_of_queries(b), samples=4000)
    assert found.value == pytest.approx(a.mean() / b.mean() - 1)
    by_scipy = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis) - 1,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = by_scipy.high - by_scipy.low
    assert found.low == pytest.approx(by_scipy.low, abs=0.05 * width)
    assert found.high == pytest.approx(by_scipy.high, abs=0.05 * width)


def test_a_gain_lies_on_the_side_of_zero_on_which_the_difference_does() -> None:
    rng = np.random.default_rng(0)
    for shift in np.linspace(-0.04, 0.04, 9):
        b = rng.uniform(0.2, 0.8, (3, 300))
        a = b + shift + rng.normal(0, 0.2, (3, 300))
        gain, plain = relative_gain(mean_of_queries(a), mean_of_queries(b))
        assert plain == difference(mean_of_queries(a), mean_of_queries(b))
        assert np.sign(gain.value) == np.sign(plain.value)
        assert gain.excludes_zero == plain.excludes_zero


def test_nothing_is_claimed_beside_a_row_that_may_be_zero_and_the_gain_has_no_upper_end() -> None:
    """Two seeds of the row beside are 0 and one is high, so that drawn means go below 0."""
    b = mean_of_queries(np.array([[0.0] * 50, [0.0] * 50, [0.3] * 50]))
    a = mean_of_queries(np.array([[0.06] * 50, [0.05] * 50, [0.07] * 50]))
    gain, plain = relative_gain(a, b)
    assert not plain.excludes_zero
    assert not gain.excludes_zero
    assert gain.high == np.inf
    assert np.isfinite(gain.low)
    assert words.bounds(gain).endswith(", +∞]")
    found = Gain(
        "recall_100", None, gain, plain, None, queries=50, one_seed=False, behind=False, apart=False
    )
    assert words.verdict(found) == "no difference shown"


@pytest.mark.parametrize("rows_of", [((3, 0.02), (3, 0.02)), ((2, 0.04), (5, 0.02))])
def test_a_null_comparison_claims_nothing_in_nearly_all_cases(
    rows_of: tuple[tuple[int, float], ...],
) -> None:
    """Two rows of one level, other seeds each: training noise, query noise, both; and a row of few
    seeds whose trainings vary more than the other's."""
    rng = np.random.default_rng(0)
    claimed = 0
    cases = 300
    for _ in range(cases):
        of_query = rng.uniform(0.2, 0.8, 200)
        rows = [
            Ratios(
                of_query + rng.normal(0, noise, (own, 1)) + rng.normal(0, 0.1, (own, 200)),
                np.ones(200),
            )
            for own, noise in rows_of
        ]
        claimed += relative_gain(rows[0], rows[1], samples=400)[1].excludes_zero
    # 5 % are allowed; more than 8 % of 300 would come by chance once in a hundred times.
    assert claimed <= 0.08 * cases


def test_rows_of_one_level_claim_nothing_and_a_better_one_is_told(made) -> None:
    bad, as_bad, good = (Row(level, made.rows[level]) for level in ("bad", "as bad", "good"))
    for metric in ("gauc", "recall_10"):
        null = relative(as_bad, bad, metric)
        better = relative(good, bad, metric)
        assert null is not None
        assert better is not None
        assert not null[1].excludes_zero
        assert better[1].low > 0
        expected = value_of(good, metric) / value_of(bad, metric) - 1
        assert better[0].value == pytest.approx(expected)


def test_the_papers_gains_are_those_of_its_abstract_numbers() -> None:
    """ACE-BERT over TwinBERT: GAUC +3.5 %, Recall@10 +44 %, Recall@100 +29 %."""
    paper = TABLE_1.paper
    gains = {m: paper["ACE-BERT"][m] / paper["TwinBERT"][m] - 1 for m in TABLE_1.metrics}
    assert gains["gauc"] == pytest.approx(0.035, abs=5e-4)
    assert gains["recall_10"] == pytest.approx(0.44, abs=5e-3)
    assert gains["recall_100"] == pytest.approx(0.29, abs=5e-3)


@pytest.mark.parametrize("table", [TABLE_1, TABLE_3, TABLE_4], ids=lambda table: table.key)
def test_every_row_with_a_number_of_the_papers_is_trained_and_compared(table: Table) -> None:
    names = [system.name for system in table.systems]
    assert set(table.paper) <= set(names)
    beside = {step.row for step in table.steps} | {step.beside for step in table.steps}
    assert set(names) <= beside


def test_comparisons_are_those_of_measured_rows_with_seen_and_unseen_queries(made) -> None:
    found = comparisons(TABLE_1, made.results.rows)
    steps = [comparison.step for comparison in found]
    assert steps == [step for step in TABLE_1.steps if step.beside != ZERO_SHOT]  # left out
    groups = {(gain.metric, gain.group) for gain in found[0].gains}
    assert {("gauc", None), ("recall_100", "unseen"), ("gauc", "seen")} <= groups
    without = {k: v for k, v in made.results.rows.items() if k != "ACE-BERT"}
    assert not [
        c for c in comparisons(TABLE_1, without) if "ACE-BERT" in (c.step.row, c.step.beside)
    ]


def gain(
    low: float, high: float, paper: float | None, queries: int = 100, one_seed: bool = False
) -> Gain:
    found = Interval((low + high) / 2, low, high, 2)
    return Gain("gauc", None, found, found, paper, queries, one_seed, behind=False, apart=False)


@pytest.mark.parametrize(
    ("low", "high", "paper", "said"),
    [
        (0.01, 0.04, 0.03, "reproduced"),
        (0.04, 0.05, 0.03, "reproduced, larger"),
        (0.01, 0.02, 0.03, "direction only, smaller"),
        (-0.04, -0.01, -0.03, "reproduced"),
        (-0.05, -0.04, -0.03, "reproduced, larger"),
        (-0.02, -0.01, -0.03, "direction only, smaller"),
        (-0.01, 0.04, 0.03, "not shown"),
        (-0.02, -0.01, 0.03, "the opposite"),
        (-0.01, 0.02, 0.03, "not shown"),
        (0.01, 0.02, None, "better"),
        (-0.02, -0.01, None, "worse"),
        (-0.01, 0.02, None, "no difference shown"),
    ],
)
def test_words_follow_the_interval(low: float, high: float, paper: float | None, said: str) -> None:
    assert words.verdict(gain(low, high, paper)) == said


def test_a_sentence_names_gain_interval_and_the_papers_number() -> None:
    told = words.step_words(Comparison(Step("ACE-BERT", "TwinBERT"), (gain(0.01, 0.04, 0.035),)))
    assert told == "ACE-BERT beside TwinBERT: GAUC +2.5 % [+1.0, +4.0] (paper +3.5 %): reproduced."


def test_metrics_of_one_verdict_share_it_in_a_sentence() -> None:
    gains = (gain(0.01, 0.04, None), gain(0.02, 0.06, None), gain(-0.02, -0.01, None))
    told = words.step_words(Comparison(Step("ACE-BERT", "TwinBERT"), gains))
    assert told == (
        "ACE-BERT beside TwinBERT: GAUC +2.5 % [+1.0, +4.0], GAUC +4.0 % [+2.0, +6.0]: better; "
        "GAUC -1.5 % [-2.0, -1.0]: worse."
    )


@pytest.mark.parametrize("paper", [0.03, None])
@pytest.mark.parametrize(
    ("queries", "one_seed", "said"),
    [
        (30, True, "one seed: not claimed"),
        (29, False, "too few queries"),
    ],
)
def test_one_seed_or_few_queries_claim_nothing_however_clear_the_interval_is(
    queries: int, one_seed: bool, said: str, paper: float | None
) -> None:
    found = gain(0.01, 0.04, paper, queries, one_seed)
    assert found.verdict == "open"
    assert words.verdict(found) == said
    assert words.verdict(gain(0.01, 0.04, paper, queries=30)) in ("reproduced", "better")


def test_a_trained_row_needs_several_seeds_to_be_claimed_and_an_untrained_one_needs_none(
    made,
) -> None:
    rows = dict(made.results.rows)
    steps = ("acebert_plus", "ACE-BERT"), ("acebert_plus", "BM25, titles + hot queries")
    table = replace(TABLE_1, steps=tuple(Step(*step) for step in steps), groups=())
    beside_bm25 = comparisons(table, rows)[1].gains
    assert not any(found.unclaimed for found in beside_bm25)
    for name in ("acebert_plus", "ACE-BERT"):
        row = rows[name].row
        once = rows | {name: replace(rows[name], row=replace(row, seeds=row.seeds[:1]))}
        assert {g.unclaimed for g in comparisons(table, once)[0].gains} == {"one seed: not claimed"}
        untrained = once | {name: replace(once[name], seconds=None)}
        assert not any(g.unclaimed for g in comparisons(table, untrained)[0].gains)


def test_a_group_of_five_queries_is_counted_and_not_claimed(made) -> None:
    """48 queries, of which 4 were never clicked before the test day."""
    (step,) = [c for c in comparisons(TABLE_1, made.results.rows) if c.step.row == "ACE-BERT"][:1]
    of = {(g.metric, g.group): g for g in step.gains}
    counts = {group: of["recall_100", group].queries for group in (None, "seen", "unseen")}
    assert counts == {None: 48, "seen": 44, "unseen": 4}
    assert of["recall_100", "unseen"].unclaimed == "too few queries"
    assert of["recall_100", "seen"].unclaimed is None


def test_a_step_from_a_pre_trained_row_to_one_that_is_not_claims_nothing(made) -> None:
    """As FashionBERT beside TwinBERT + MLM in the tiny recipes; TwinBERT + MLM beside TwinBERT is
    there to show what pre-training brings."""
    rows = dict(made.results.rows)
    pretrained = load_settings(["--recipe", "twinbert_mlm_tiny"])
    random = load_settings(["--recipe", "fashionbert_tiny"])
    for name, settings in (
        *(("TwinBERT", random), ("TwinBERT + MLM", pretrained)),
        ("FashionBERT-Finetune", random),
    ):
        rows[name] = replace(rows[name], settings=settings)
    steps = tuple(
        step for step in TABLE_1.steps if step.row in ("TwinBERT + MLM", FASHIONBERT.name)
    )
    table = replace(TABLE_1, steps=steps, groups=())
    said = {
        (c.step.row, c.step.beside): {gain.unclaimed for gain in c.gains}
        for c in comparisons(table, rows)
    }
    why = "the other alone is pre-trained: not claimed"
    assert said["FashionBERT-Finetune", "TwinBERT + MLM"] == {why}
    assert said["FashionBERT-Finetune", "TwinBERT"] == {None}
    assert said["TwinBERT + MLM", "TwinBERT"] == {None}
    rows["FashionBERT-Finetune"] = replace(rows["FashionBERT-Finetune"], settings=pretrained)
    assert {g.unclaimed for c in comparisons(table, rows) for g in c.gains} == {None}


def test_a_row_of_random_weights_claims_nothing_beside_a_rival_that_was_pre_trained(made) -> None:
    table = replace(TABLE_1, steps=(Step("acebert_plus", RIVAL),), groups=())
    rows = dict(made.results.rows)
    rows[RIVAL] = replace(rows[RIVAL], settings=None, others={"model": "MiniLM"})
    said = {}
    for start in ([], ["--model.backbone", "bert-base-uncased"], ["--model.start", "pretrain"]):
        settings = load_settings(["--recipe", "acebert_plus_tiny", *start])
        rows["acebert_plus"] = replace(rows["acebert_plus"], settings=settings)
        (found,) = comparisons(table, rows)
        said[" ".join(start)] = {gain.unclaimed for gain in found.gains}
    assert list(said.values()) == [
        {"the other alone is pre-trained: not claimed"},
        {"one seed: not claimed"},  # which the rival has
        {"one seed: not claimed"},
    ]


def test_rows_that_the_clock_ended_at_other_numbers_of_pairs_claim_nothing(made) -> None:
    table = replace(TABLE_1, steps=(Step("ACE-BERT", "TwinBERT"),), groups=())
    for minutes, pairs, said in (
        (["--train.max_minutes", "5"], 1_060, "other numbers of pairs: not claimed"),
        (["--train.max_minutes", "5"], 1_040, None),
        ([], 1_060, None),
    ):
        settings = load_settings(["--recipe", "acebert_tiny", *minutes])
        rows = {
            name: replace(made.results.rows[name], settings=settings, pairs=own)
            for name, own in (("ACE-BERT", 1_000), ("TwinBERT", pairs))
        }
        (found,) = comparisons(table, rows)
        assert {gain.unclaimed for gain in found.gains} == {said}


def test_the_papers_comparisons_are_counted_by_what_became_of_them() -> None:
    gains = (
        *(gain(0.01, 0.04, 0.03), gain(0.01, 0.02, 0.03), gain(0.01, 0.02, 0.03)),
        *(gain(-0.02, -0.01, 0.03), gain(0.01, 0.04, 0.03, one_seed=True)),
        gain(0.01, 0.04, None),  # the paper has no such number
    )
    told = words.count_words([Comparison(Step("ACE-BERT", "TwinBERT"), gains)])
    assert told == (
        "The paper's 5 comparisons of two rows in one metric: 1 reproduced: the direction is shown,"
        " and the paper's gain lies in the interval; 2 in the paper's direction, but with a smaller"
        " gain; 1 the other way round; 1 not claimed, for a row was trained with one seed."
    )


def test_the_order_is_told_only_where_every_step_is_shown(made) -> None:
    found = comparisons(TABLE_1, made.results.rows)
    told = words.order_words(found, "gauc")
    assert "FashionBERT-Finetune over TwinBERT: not shown" in told  # of one level
    assert "CE-BERT-Finetune over FashionBERT-Finetune" not in told
    rest = [c for c in found if c.step.row != "FashionBERT-Finetune"]
    assert words.order_words(rest, "gauc") == ""
