"""Tables against sums by hand, over real log files."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import Action, EventLog, Exposure
from acebert.experiment.readout import read_out, report_text, write_report

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SPLIT = Experiment("test", ("old", "new"), (0.5, 0.5), "", "split")
BOTH = Experiment("both", ("old", "new"), (0.5, 0.5), "", "interleave")


def shown(search: str, user: str, arm: str | None, teams: list[str] | None = None) -> Exposure:
    name = "test" if teams is None else "both"
    return Exposure(search, NOW, name, arm, user, "q", ["p1", "p2", "p3", "p4"], teams)


def logged(directory: Path, events: list[Exposure | Action]) -> Path:
    log = EventLog(directory)
    log.append(events)
    log.close()
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
    assert not list(tmp_path.glob(".readout*"))


def test_votes_are_counted_by_reviewer_and_the_first_on_a_search_holds(tmp_path: Path) -> None:
    teams = ["old", "old", "new", "new"]
    sides = [
        Exposure(f"s{i}", NOW, "test", None, f"r{i % 4}", "q", [*"abcd"], teams) for i in range(12)
    ]
    late = NOW + timedelta(minutes=1)
    won = ["new", "new", "old", "new", "new", "new", "new", "", "new", "old", "new", ""]
    events: list[Exposure | Action] = [*sides, shown("t1", "u1", "old"), shown("t2", "u2", "new")]
    events += [Action(f"s{i}", NOW, "vote", arm) for i, arm in enumerate(won)]
    events += [Action("s0", late, "vote", "old"), Action("s0", late, "vote", "")]
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


def test_a_log_without_votes_has_none(tmp_path: Path) -> None:
    found = read_out(SPLIT, logged(tmp_path, [shown("s", "u", "old")]))
    assert found.votes == {}
