"""Tables against sums by hand, over real log files."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import Action, EventLog, Exposure
from acebert.experiment.readout import read_out, report_text, write_report

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SPLIT = Experiment("test", ("old", "new"), (0.5, 0.5), "", "split")
BOTH = Experiment("both", ("old", "new"), (0.5, 0.5), "", "interleave")


def shown(
    search: str, user: str, arm: str | None, teams: list[str | None] | None = None
) -> Exposure:
    name = "test" if teams is None else "both"
    of = SPLIT if teams is None else BOTH
    products = ["p1", "p2", "p3", "p4"]
    versions = {name: "model" for name in ([arm] if arm else of.arms)}
    return Exposure(
        search, NOW, name, arm, user, "q", products, of.dealing, of.design, versions, teams
    )


def beside(search: str, user: str, of: Experiment) -> Exposure:
    """Two lists of two products."""
    versions, teams = dict.fromkeys(of.arms, "model"), ["old", "old", "new", "new"]
    return Exposure(
        *(search, NOW, of.name, None, user, "q", [*"abcd"]),
        *(of.dealing, "compare", versions, teams),
    )


def logged(directory: Path, events: list[Exposure | Action]) -> Path:
    log = EventLog(directory)
    log.append(events)
    log.flush()
    return directory


def test_each_search_and_click_counts_once_and_strays_do_not(tmp_path: Path) -> None:
    late = NOW + timedelta(hours=30)
    events = [
        *[shown("s1", "u1", "old"), shown("s2", "u1", "old"), shown("s3", "u2", "new")],
        *[shown("s4", "u3", "old"), shown("s5", "u4", "new"), shown("s1", "u1", "old")],
        Action("s1", NOW, "click", "p2"),
        Action("s1", late, "click", "p2"),  # again, next day
        Action("s3", NOW, "click", "p1"),
        Action("s3", NOW, "click", "p4"),
        Action("s3", NOW, "purchase", "p4", 30.0),
        Action("s4", NOW, "purchase", "p1", 10.0),
        Action("s4", NOW, "click", "p9"),  # was not shown
        Action("nobody", NOW, "click", "p1"),  # was not searched
    ]
    found = read_out(SPLIT, logged(tmp_path, events))
    old, new = found.arms["old"], found.arms["new"]
    assert (old.users, old.searches, new.users, new.searches) == (2, 3, 2, 2)
    assert old.values == {"ctr": 1 / 12, "revenue": 10 / 3}
    assert new.values == {"ctr": 2 / 8, "revenue": 15.0}
    assert new.lifts["ctr"].value == pytest.approx(2.0)
    assert old.lifts == {}
    assert (found.not_shown, found.without_search) == (1, 1)


def test_users_in_two_arms_are_left_out_and_a_mismatch_is_shouted(tmp_path: Path) -> None:
    events: list[Exposure | Action] = [shown(f"s{i}", f"u{i}", "old") for i in range(80)]
    events += [shown(f"t{i}", f"u{i}", "new") for i in range(70, 100)]
    found = read_out(SPLIT, logged(tmp_path, events))
    assert found.users_in_two_arms == 10
    assert (found.arms["old"].users, found.arms["new"].users) == (70, 20)
    assert "MISMATCH" in report_text(found)


def test_interleaved_searches_are_won_by_the_team_with_more_clicks(tmp_path: Path) -> None:
    teams = ["old", "new", "new", "old"]
    events: list[Exposure | Action] = []
    for user in range(40):
        for i in range(3):
            name = f"s{user}-{i}"
            events.append(shown(name, f"u{user}", None, teams))
            clicked = ["p2", "p3", "p1"] if i else ["p1", "p2"]  # new wins two, one is a draw
            events += [Action(name, NOW, "click", product) for product in clicked]
    events += [shown("x", "u0", None, teams), Action("x", NOW, "click", "p4")]  # old wins one
    found = read_out(BOTH, logged(tmp_path, events))
    assert found.preference is not None
    assert found.preference.value == pytest.approx((80 - 1) / 81)
    assert found.interleaved_users == 40
    assert found.preference_p < 1e-6
    assert "preference for new over old" in report_text(found)
    write_report(found, tmp_path)
    assert (tmp_path / "effects.png").stat().st_size > 5000


def test_clicks_on_lists_side_by_side_win_no_interleaved_search(tmp_path: Path) -> None:
    teams = ["old", "new", "new", "old"]
    events: list[Exposure | Action] = [
        shown("s", "u", None, teams),
        Action("s", NOW, "click", "p2"),
    ]
    for user in range(10):
        events += [beside(f"c{user}", f"r{user}", BOTH), Action(f"c{user}", NOW, "click", "a")]
    found = read_out(BOTH, logged(tmp_path, events))
    assert found.preference is not None
    assert (found.preference.value, found.interleaved_users) == (1.0, 1)


def test_of_a_search_that_was_sent_again_the_last_list_counts(tmp_path: Path) -> None:
    again = replace(shown("s1", "u1", "old"), at=NOW + timedelta(seconds=2), products=["p8", "p9"])
    clicks = [Action("s1", NOW + timedelta(seconds=9), "click", name) for name in ("p9", "p1")]
    found = read_out(SPLIT, logged(tmp_path, [again, shown("s1", "u1", "old"), *clicks]))
    assert found.arms["old"].values["ctr"] == 1 / 2
    assert (found.arms["old"].searches, found.not_shown) == (1, 1)


def test_an_arm_that_more_than_one_model_answered_for_is_told(tmp_path: Path) -> None:
    events: list[Exposure | Action] = [shown(f"s{i}", f"u{i}", "old") for i in range(3)]
    for day, version in ((0, "first"), (1, "second"), (2, "second")):
        at = NOW + timedelta(days=day)
        events.append(replace(shown(f"n{day}", "v", "new"), at=at, versions={"new": version}))
    found = read_out(SPLIT, logged(tmp_path, events))
    assert found.versions["old"] == [("model", "2026-03-01")]
    assert found.versions["new"] == [("first", "2026-03-01"), ("second", "2026-03-02")]
    told = "new was answered by 2 models (first from 2026-03-01 on, second from 2026-03-02 on)"
    assert told in report_text(found)
    later = read_out(SPLIT, tmp_path, first=date(2026, 3, 2))
    assert "models" not in report_text(later)


def test_settings_that_are_not_those_of_the_log_are_told(tmp_path: Path) -> None:
    events = [shown(f"s{i}", f"u{i}", SPLIT.arm(f"u{i}")) for i in range(200)]
    assert not read_out(SPLIT, logged(tmp_path, list(events))).dealt_otherwise
    found = read_out(replace(SPLIT, shares=(0.1, 0.9)), tmp_path)
    assert found.dealt_otherwise
    assert found.mismatch_p < 0.001
    told = report_text(found)
    assert told.index("than these settings say") < told.index("MISMATCH")


def test_searches_that_do_not_say_how_their_list_was_made_are_refused(tmp_path: Path) -> None:
    logged(tmp_path, [shown("s1", "u1", "old"), replace(shown("s2", "u2", "old"), design=None)])
    with pytest.raises(UserError, match="1 searches of these days do not say their `design`"):
        read_out(SPLIT, tmp_path)
    (file,) = tmp_path.glob("exposure/*/*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["design", "versions"]), file)
    with pytest.raises(UserError, match="has no column design, versions"):
        read_out(SPLIT, tmp_path)


def test_a_simulated_experiment_prints_and_draws_what_was_planted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    events: list[Exposure | Action] = []
    for user in range(1500):
        arm = SPLIT.arm(f"u{user}")
        for i in range(int(rng.integers(1, 5))):
            name = f"s{user}-{i}"
            events.append(shown(name, f"u{user}", arm))
            clicked = np.flatnonzero(rng.random(4) < (0.15 if arm == "new" else 0.10))
            events += [Action(name, NOW, "click", f"p{place + 1}") for place in clicked]
    found = read_out(SPLIT, logged(tmp_path, events))
    effect = found.arms["new"].lifts["ctr"]
    assert effect.low < 0.5 < effect.high
    assert effect.found
    assert found.mismatch_p > 0.001
    write_report(found, tmp_path)
    assert (tmp_path / "effects.png").stat().st_size > 5000
    assert "new" in (tmp_path / "report.txt").read_text()


def test_no_difference_is_found_at_the_nominal_rate_from_dealing_to_report(tmp_path: Path) -> None:
    """A/A experiments on the same users, each with a taste of their own, in one log."""
    rng, users, log = np.random.default_rng(1), 120, EventLog(tmp_path)
    runs = [replace(SPLIT, name=f"aa{i}") for i in range(24)]
    for run in runs:
        events: list[Exposure | Action] = []
        for user, taste in enumerate(rng.beta(1, 4, users)):
            arm = run.arm(f"u{user}")
            for i in range(rng.geometric(0.4)):
                name = f"{run.name}-{user}-{i}"
                events.append(replace(shown(name, f"u{user}", arm), experiment=run.name))
                places = np.flatnonzero(rng.random(4) < taste)
                events += [Action(name, NOW, "click", f"p{place + 1}") for place in places]
        log.append(events)
    log.flush()
    found = [read_out(run, tmp_path) for run in runs]
    effects = [one.arms["new"].lifts["ctr"] for one in found]
    alarms = sum(effect.found for effect in effects)
    assert stats.binomtest(alarms, len(runs), 0.05).pvalue > 0.01
    squares = sum((np.log1p(effect.value) / effect.error) ** 2 for effect in effects)
    low, high = stats.chi2(len(runs)).interval(0.998)  # their spread is that of their intervals
    assert low < squares < high
    assert sum(one.mismatch_p < 0.05 for one in found) < 6
    assert {sum(arm.users for arm in one.arms.values()) for one in found} == {users}


def test_a_log_without_the_experiment_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no search is logged"):
        read_out(SPLIT, tmp_path)
    logged(tmp_path, [shown("s1", "u1", "old")])
    with pytest.raises(UserError, match="'both'"):
        read_out(BOTH, tmp_path)


def test_an_arm_that_the_settings_do_not_have_is_refused(tmp_path: Path) -> None:
    logged(tmp_path, [shown("s1", "u1", "old"), shown("s2", "u2", "newest")])
    with pytest.raises(UserError, match=r"experiment.arms.*newest"):
        read_out(SPLIT, tmp_path)


@pytest.mark.parametrize("content", [b"PAR1 and then", None])
def test_a_file_that_is_no_log_is_named(tmp_path: Path, content: bytes | None) -> None:
    logged(tmp_path, [shown("s1", "u1", "old")])
    bad = tmp_path / "action" / "2026-03-01" / "bad.parquet"
    bad.parent.mkdir(parents=True)
    if content is None:
        pq.write_table(pa.table({"search": ["s1"]}), bad)
    else:
        bad.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.parquet"):
        read_out(SPLIT, tmp_path)


def test_votes_are_counted_by_reviewer_and_the_first_on_a_search_holds(tmp_path: Path) -> None:
    sides = [beside(f"s{i}", f"r{i % 4}", SPLIT) for i in range(12)]
    late = NOW + timedelta(minutes=1)
    won = ["new", "new", "old", "new", "new", "new", "new", "", "new", "old", "new", ""]
    events: list[Exposure | Action] = [*sides, shown("t1", "u1", "old"), shown("t2", "u2", "new")]
    events += [Action(f"s{i}", NOW, "vote", arm) for i, arm in enumerate(won)]
    events += [Action("s0", late, "vote", "old"), Action("s0", late, "vote", "")]
    events.append(Action("t2", NOW, "vote", "old"))  # on a search that showed one arm
    found = read_out(SPLIT, logged(tmp_path, events))
    votes = found.votes["new"]
    assert (votes.reviewers, votes.votes) == (4, 10)
    # r0: 3 of 3 for new; r1: 2 and 1 for old; r2: 2 and 1; r3: 1 of 1, and twice neither
    assert votes.preference.value == pytest.approx((3 + 1 + 1 + 1) / 10)
    assert votes.p == pytest.approx(2 * 0.5**4)  # four reviewers, all for new
    assert (found.not_shown, found.arms["old"].searches) == (0, 1)
    assert "votes: preference for new over old +60.00%" in report_text(found)
    write_report(found, tmp_path)
    assert (tmp_path / "effects.png").stat().st_size > 5000


def test_a_vote_counts_where_the_treatment_found_nothing(tmp_path: Path) -> None:
    alone = replace(beside("s", "r", SPLIT), products=["a"], teams=["old"])
    events: list[Exposure | Action] = [alone, Action("s", NOW, "vote", "old")]
    found = read_out(SPLIT, logged(tmp_path, [*events, shown("t", "u", "old")]))
    votes = found.votes["new"]
    assert (votes.votes, votes.preference.value) == (1, -1)


def test_votes_count_in_a_log_without_versions(tmp_path: Path) -> None:
    sides = [replace(beside(f"s{i}", f"r{i}", SPLIT), versions={}) for i in range(3)]
    won = [Action(f"s{i}", NOW, "vote", arm) for i, arm in enumerate(["new", "new", "old"])]
    found = read_out(SPLIT, logged(tmp_path, [*sides, *won, shown("t", "u", "old")]))
    votes = found.votes["new"]
    assert (votes.votes, votes.preference.value) == (3, pytest.approx(1 / 3))


def test_a_log_without_votes_has_none(tmp_path: Path) -> None:
    found = read_out(SPLIT, logged(tmp_path, [shown("s", "u", "old")]))
    assert found.votes == {}


def clicked(rng: np.random.Generator, rates: dict[str, float], users: int) -> list[Any]:
    """Events of so many users of each arm, who click at these rates."""
    events: list[Exposure | Action] = []
    for arm, rate in rates.items():
        for user in range(users):
            name = f"{arm}-{user}"
            events.append(shown(name, name, arm))
            places = np.flatnonzero(rng.random(4) < rate)
            events += [Action(name, NOW, "click", f"p{place + 1}") for place in places]
    return events


def test_treatments_are_compared_with_each_other(tmp_path: Path) -> None:
    three = replace(SPLIT, arms=("old", "new", "newer"), shares=(1 / 3,) * 3)
    rates = {"old": 0.1, "new": 0.2, "newer": 0.3}
    logged(tmp_path, clicked(np.random.default_rng(0), rates, 800))
    found = read_out(three, tmp_path)
    assert {name: set(others) for name, others in found.pairs.items()} == {"newer": {"new"}}
    effect = found.pairs["newer"]["new"]
    ctr = {name: arm.values["ctr"] for name, arm in found.arms.items()}
    assert effect.value == pytest.approx(ctr["newer"] / ctr["new"] - 1)
    assert effect.low < 0.5 < effect.high
    assert effect.found
    assert "CTR lift of newer over new +" in report_text(found)


def test_the_searches_that_a_lift_takes_do_not_depend_on_the_lift_that_was_found(
    tmp_path: Path,
) -> None:
    """Lehr's rule on users with one product each: 15.7 p (1 - p) / (p L)^2 for a lift of L."""
    p, n = 0.2, 4000
    events: list[Exposure | Action] = []
    for arm, clicks in (("old", round(p * n)), ("new", round(p * n) + 1)):
        for user in range(n):
            name = f"{arm}-{user}"
            events.append(replace(shown(name, name, arm), products=["p1"]))
            if user < clicks:
                events.append(Action(name, NOW, "click", "p1"))
    logged(tmp_path, events)
    found = read_out(SPLIT, tmp_path, looked_for=0.02)
    assert abs(found.arms["new"].lifts["ctr"].value) < 0.01
    assert found.arms["new"].needed == pytest.approx(15.7 * (1 - p) / (p * 0.02**2), rel=0.03)
    assert np.isnan(found.arms["old"].needed)
    assert "see +2.0% CTR" in report_text(found)


@pytest.mark.parametrize(("buyers", "claimed"), [(99, False), (100, True)])
def test_a_lift_in_revenue_has_an_interval_from_a_hundred_buyers_on(
    tmp_path: Path, buyers: int, claimed: bool
) -> None:
    events: list[Exposure | Action] = []
    for arm, bought in (("old", buyers), ("new", 150)):
        for user in range(400):
            name = f"{arm}-{user}"
            events += [shown(name, name, arm), Action(name, NOW, "click", f"p{1 + user % 3}")]
            if user < bought:
                price = 1000.0 if arm == "new" else 1.0 + user % 2
                events.append(Action(name, NOW, "purchase", "p1", price))
    found = read_out(SPLIT, logged(tmp_path, events))
    effect = found.arms["new"].lifts["revenue"]
    assert found.arms["old"].buyers == buyers
    assert effect.value > 100
    assert effect.found == claimed
    assert np.isnan(effect.low) != claimed
    assert ("fewer than 100 buyers (old has 99)" in report_text(found)) != claimed


def test_searches_of_an_earlier_dealing_are_left_out_and_counted(tmp_path: Path) -> None:
    faulty, later = replace(SPLIT, salt="faulty"), NOW + timedelta(days=2)
    events: list[Exposure | Action] = []
    for user in range(30):
        name = f"u{user}"
        events.append(replace(shown(f"s{user}", name, "old"), dealing=faulty.dealing))
        arm = SPLIT.arm(name)
        events.append(replace(shown(f"t{user}", name, arm), at=later))
        events += [
            Action(f"s{user}", later, "click", "p1"),
            Action(f"t{user}", later, "click", "p2"),
        ]
    logged(tmp_path, events)
    found = read_out(SPLIT, tmp_path)
    assert (found.other_dealings, found.users_in_two_arms, found.without_search) == (30, 0, 0)
    assert sum(arm.searches for arm in found.arms.values()) == 30
    assert [arm.values["ctr"] for arm in found.arms.values()] == [0.25, 0.25]
    assert (found.first_day, found.last_day) == ("2026-03-03", "2026-03-03")
    text = report_text(found)
    assert "searches of 2026-03-03 to 2026-03-03" in text
    assert "30 searches in these days are left out" in text
    before = read_out(SPLIT, tmp_path, last=date(2026, 3, 2))
    assert (before.arms["old"].searches, before.other_dealings) == (30, 0)


def test_another_salt_share_arm_or_design_is_another_dealing() -> None:
    others = [
        replace(SPLIT, salt="again"),
        replace(SPLIT, shares=(0.4, 0.6)),
        replace(SPLIT, arms=("old", "newer")),
        replace(SPLIT, design="interleave"),
    ]
    assert len({SPLIT.dealing, *(other.dealing for other in others)}) == 5
    assert replace(SPLIT, name="other").dealing == SPLIT.dealing


def test_the_days_that_are_asked_for_count_and_no_others(tmp_path: Path) -> None:
    at = {
        "a": NOW - timedelta(milliseconds=1),
        "b": NOW,
        "c": NOW + timedelta(hours=23, minutes=59),
    }
    at["d"] = NOW + timedelta(days=1)
    logged(tmp_path, [replace(shown(name, name, "old"), at=when) for name, when in at.items()])
    found = read_out(SPLIT, tmp_path, first=date(2026, 3, 1), last=date(2026, 3, 1))
    assert found.arms["old"].searches == 2
    assert (found.first_day, found.last_day) == ("2026-03-01", "2026-03-01")
    assert read_out(SPLIT, tmp_path, first=date(2026, 3, 2)).arms["old"].searches == 1
    with pytest.raises(UserError, match=r"no search.*from 2026-04-01"):
        read_out(SPLIT, tmp_path, first=date(2026, 4, 1))


def test_a_directory_that_is_called_like_a_column_is_none(tmp_path: Path) -> None:
    directory = tmp_path / "user=alice" / "arm=new"
    found = read_out(SPLIT, logged(directory, [shown(f"s{i}", f"u{i}", "old") for i in range(5)]))
    assert {name: arm.users for name, arm in found.arms.items()} == {"old": 5}


def test_purchases_that_nobody_knows_the_revenue_of_are_counted(tmp_path: Path) -> None:
    events: list[Exposure | Action] = [shown("s1", "u1", "old"), shown("s2", "u2", "new")]
    events += [Action("s1", NOW, "purchase", "p1"), Action("s2", NOW, "purchase", "p1", 5.0)]
    found = read_out(SPLIT, logged(tmp_path, events))
    assert found.without_revenue == 1
    assert "1 purchases have no revenue" in report_text(found)


def test_products_that_fill_up_a_draft_win_for_nobody(tmp_path: Path) -> None:
    events: list[Exposure | Action] = []
    for user in range(12):
        events.append(shown(f"s{user}", f"u{user}", None, ["old", "new", None, None]))
        events.append(Action(f"s{user}", NOW, "click", "p2" if user < 5 else "p1"))
        events += [Action(f"s{user}", NOW, "click", name) for name in ("p3", "p4")]
    found = read_out(BOTH, logged(tmp_path, events))
    assert found.preference is not None
    assert found.preference.value == pytest.approx((5 - 7) / 12)
    assert found.not_shown == 0


def test_what_is_spilled_does_not_lie_in_the_log(tmp_path: Path) -> None:
    logs, scratch = logged(tmp_path / "logs", [shown("s1", "u1", "old")]), tmp_path / "scratch"
    scratch.mkdir()
    written = {path: path.stat().st_mtime_ns for path in (logs, *logs.rglob("*"))}
    read_out(SPLIT, logs, scratch=scratch)
    assert {path: path.stat().st_mtime_ns for path in (logs, *logs.rglob("*"))} == written
    assert list(scratch.iterdir()) == []
