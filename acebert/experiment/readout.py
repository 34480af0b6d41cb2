"""What an experiment says: lifts by arm, or who wins in interleaved lists.

    readout = read_out(Experiment(...), workdir / "serving" / "events")

Read from the log's Parquet files by DuckDB, which spills to disk; only sums by user come to memory.
Of the searches in the days that are asked for, those of the newest dealing count: users whom other
shares or another salt dealt otherwise are another experiment's.
A search, and an action on one product of a search, count once however often they were logged; of
the lists of a search that was sent again the last, for that is the one that the shopper had.
Actions on searches or products that the log does not show count as strays and nowhere else; users
who were in two arms are left out and counted.
"""

import io
import json
import math
from dataclasses import asdict, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from acebert.data.database import open_database
from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.event_log import SCHEMAS
from acebert.experiment.statistics import (
    BUYERS,
    MISMATCH,
    Effect,
    PerUser,
    lift,
    needed,
    preference,
    sample_ratio,
    sign_test,
)

COLOUR = "#1f5fa8"
METRICS = {"ctr": "CTR", "revenue": "revenue a search"}
LIFT = 0.05

_SEARCHES = """
CREATE TABLE searches AS
SELECT search_id, arm, "user", products, teams, "at", coalesce(dealing, '') AS dealing, design,
    versions
FROM {exposures}
WHERE experiment = {name} AND CAST("at" AS DATE) BETWEEN {first} AND {last}
QUALIFY row_number() OVER (PARTITION BY search_id ORDER BY "at" DESC) = 1
"""

_OTHER_DEALINGS = """
DELETE FROM searches WHERE dealing <> (SELECT dealing FROM searches ORDER BY "at" DESC LIMIT 1)
"""

_DEALT_OTHERWISE = """
SELECT count(*) FROM searches WHERE dealing <> {dealing}
"""

_WITHOUT_DESIGN = """
SELECT count(*) FROM searches WHERE design IS NULL
"""

_VERSIONS = """
SELECT entry.key, entry.value, CAST(CAST(min("at") AS DATE) AS TEXT)
FROM (SELECT unnest(map_entries(versions)) AS entry, "at" FROM searches)
GROUP BY entry.key, entry.value ORDER BY min("at"), entry.value
"""

_DAYS = """
SELECT CAST(min(CAST("at" AS DATE)) AS TEXT), CAST(max(CAST("at" AS DATE)) AS TEXT) FROM searches
"""

_ACTIONS = """
CREATE TABLE actions AS
SELECT search_id, action, product_id, revenue, "at",
    teams[list_position(products, product_id)] AS team,
    list_contains(products, product_id) AS shown
FROM (FROM {actions}
      QUALIFY row_number() OVER (PARTITION BY search_id, action, product_id ORDER BY "at") = 1)
JOIN (SELECT search_id, products, teams FROM searches) USING (search_id)
"""

_WITHOUT_SEARCH = """
SELECT count(*) FROM (SELECT DISTINCT search_id, action, product_id FROM {actions})
ANTI JOIN {exposures} USING (search_id)
"""

_NOT_SHOWN = """
SELECT count(*) FROM actions WHERE NOT shown AND action <> 'vote'
"""

_WITHOUT_REVENUE = """
SELECT count(*) FROM actions WHERE shown AND action = 'purchase' AND revenue IS NULL
"""

_ARMS = """
SELECT arm FROM searches UNION SELECT unnest(teams) FROM searches
"""

_USERS = """
SELECT min(arm), count(*), sum(len(products)), sum(clicks), sum(spent)
FROM searches LEFT JOIN (
    SELECT search_id, count(*) FILTER (action = 'click') AS clicks,
        sum(revenue) FILTER (action = 'purchase') AS spent
    FROM actions WHERE shown GROUP BY search_id
) USING (search_id) WHERE arm IS NOT NULL GROUP BY "user" HAVING count(DISTINCT arm) = 1
"""

_IN_TWO_ARMS = """
SELECT count(*) FROM (SELECT "user" FROM searches GROUP BY "user" HAVING count(DISTINCT arm) > 1)
"""

_WINS = """
SELECT sum(sign(b - a)), count(*) FILTER (a <> b) FROM (
    SELECT "user", count(*) FILTER (team = {a}) AS a, count(*) FILTER (team = {b}) AS b
    FROM actions JOIN searches USING (search_id)
    WHERE shown AND action = 'click' AND design = 'interleave' GROUP BY search_id, "user"
) GROUP BY "user" HAVING count(*) FILTER (a <> b) > 0
"""


_VOTES = """
SELECT treatment, count(*) FILTER (won = treatment) - count(*) FILTER (won = {control}), count(*)
FROM (
    SELECT "user", product_id AS won,
        list_filter(list_concat(teams, map_keys(versions)), lambda arm: arm <> {control})[1]
            AS treatment
    FROM actions JOIN searches USING (search_id) WHERE action = 'vote' AND design = 'compare'
    QUALIFY row_number() OVER (PARTITION BY search_id ORDER BY actions."at") = 1
)
WHERE won IN (treatment, {control}) GROUP BY treatment, "user" ORDER BY treatment
"""


@dataclass(frozen=True)
class Votes:
    """Of reviewers who saw a treatment beside the control."""

    preference: Effect
    """of the treatment, of the votes that found one better"""
    p: float
    """sign test over reviewers"""
    reviewers: int
    votes: int
    """that found one better"""


@dataclass(frozen=True)
class ArmResult:
    """One arm of a split."""

    users: int
    searches: int
    buyers: int
    """users with revenue"""
    values: dict[str, float]
    lifts: dict[str, Effect]
    """against the control, by metric; none for itself"""
    needed: float
    """searches of this arm, the control's growing likewise, at which the lift in CTR that is looked
    for is found with 80 % power; NaN of the control"""


@dataclass(frozen=True)
class Readout:
    """What the log holds of an experiment."""

    name: str
    arm_names: tuple[str, ...]
    """as they were dealt, the control first"""
    arms: dict[str, ArmResult]
    """of a split; those that have users"""
    pairs: dict[str, dict[str, Effect]]
    """of a split with several treatments: lift in CTR of one (first key) over an earlier one"""
    looked_for: float
    """lift that `ArmResult.needed` is of"""
    first_day: str
    """of the searches that count, UTC, ISO 8601"""
    last_day: str
    other_dealings: int
    """searches in these days that do not count, for users were dealt otherwise then"""
    dealt_otherwise: bool
    """than by the settings that the report is given, whose shares `mismatch_p` is of"""
    versions: dict[str, list[tuple[str, str]]]
    """arm → versions of its model, each with its first day; those of the log, the oldest first"""
    mismatch_p: float
    """of the users by arm under the planned shares; below MISMATCH no lift is to be believed"""
    preference: Effect | None
    """interleaved: of the second arm over the control, of the searches that one of them won"""
    preference_p: float
    """sign test over users"""
    interleaved_users: int
    votes: dict[str, Votes]
    """by treatment; those that were voted on"""
    users_in_two_arms: int
    not_shown: int
    """actions on products that their search did not show"""
    without_search: int
    """actions on searches that are not in the log, whatever their experiment"""
    without_revenue: int
    """purchases whose revenue nobody told, which count as 0"""


def read_out(
    experiment: Experiment,
    events: Path,
    memory_limit: str = "2GB",
    *,
    first: date = date.min,
    last: date = date.max,
    looked_for: float = LIFT,
    scratch: Path | None = None,
) -> Readout:
    """
    Args:
        events: the directory of the log, whose files stay while it is read.
        first, last: days of the searches that count, UTC, both included.
        looked_for: relative lift in CTR that `ArmResult.needed` is of.
        scratch: where what does not fit in `memory_limit` is spilled (none: the system's directory
            of temporary files).

    Raises:
        UserError: the log has no search of this experiment in these days, or other arms; a file of
            it cannot be read, or lacks a column.
    """
    exposures, actions = (
        sorted(events.glob(f"{kind}/*/*.parquet")) for kind in ("exposure", "action")
    )
    if not exposures:
        raise UserError(
            f"{events}: no search is logged there (no exposure/DAY/*.parquet; replicas write them "
            "now and then)"
        )
    with (
        TemporaryDirectory(prefix="readout-", dir=scratch) as spill,
        open_database(Path(spill) / "database", memory_limit) as con,
    ):
        try:
            con.execute(
                _SEARCHES.format(
                    exposures=_read(exposures),
                    name=_text(experiment.name),
                    first=f"DATE '{first}'",
                    last=f"DATE '{last}'",
                )
            )
            ((other_dealings,),) = con.execute(_OTHER_DEALINGS).fetchall()
            without_search = _load_actions(con, exposures, actions)
        except (duckdb.BinderException, duckdb.IOException, duckdb.InvalidInputException) as error:
            for kind, paths in (("exposure", exposures), ("action", actions)):
                _refuse_lacking(kind, paths)
            raise UserError(f"{events}: a file of the log cannot be read: {error}") from error
        arms = {arm for (arm,) in con.sql(_ARMS).fetchall() if arm is not None}
        ((first_day, last_day),) = con.sql(_DAYS).fetchall()
        if first_day is None:
            raise UserError(
                f"{events}: no search of an experiment {experiment.name!r}"
                + (f" from {first} to {last}" if (first, last) != (date.min, date.max) else "")
            )
        if unknown := arms - set(experiment.arms):
            raise UserError(
                f"--experiment.arms: {', '.join(experiment.arms)} are given, but the log of "
                f"{experiment.name!r} has {', '.join(sorted(unknown))} too"
            )
        if unsaid := _count(con, _WITHOUT_DESIGN):
            raise UserError(
                f"{events}: {unsaid:,} searches of these days do not say their `design` "
                "(docs/experiments.md), as those of an earlier version: --from a later day"
            )
        per_user = _per_user(con, experiment)
        won, won_p, judges = _interleaved(con, experiment)
        return Readout(
            name=experiment.name,
            arm_names=experiment.arms,
            arms=_arms(experiment, per_user, looked_for),
            pairs=_pairs(experiment, per_user),
            looked_for=looked_for,
            first_day=first_day,
            last_day=last_day,
            other_dealings=other_dealings,
            dealt_otherwise=_count(con, _DEALT_OTHERWISE.format(dealing=_text(experiment.dealing)))
            > 0,
            versions=_versions(con),
            mismatch_p=_mismatch(experiment, per_user),
            preference=won,
            preference_p=won_p,
            interleaved_users=judges,
            votes=_votes(con, experiment),
            users_in_two_arms=_count(con, _IN_TWO_ARMS),
            not_shown=_count(con, _NOT_SHOWN),
            without_search=without_search,
            without_revenue=_count(con, _WITHOUT_REVENUE),
        )


def _load_actions(
    con: duckdb.DuckDBPyConnection, exposures: list[Path], actions: list[Path]
) -> int:
    """Make the table `actions` beside `searches`; how many actions have no search in the log."""
    if not actions:
        con.execute(
            "CREATE TABLE actions (search_id TEXT, action TEXT, product_id TEXT, revenue DOUBLE, "
            '"at" TIMESTAMPTZ, team TEXT, shown BOOLEAN)'
        )
        return 0
    con.execute(_ACTIONS.format(actions=_read(actions)))
    return _count(con, _WITHOUT_SEARCH.format(actions=_read(actions), exposures=_read(exposures)))


def _count(con: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(con.sql(sql).fetchall()[0][0])


def _refuse_lacking(kind: str, paths: list[Path]) -> None:
    """
    Raises:
        UserError: a file without a column that it needs, or one that is no Parquet.
    """
    for path in paths:
        try:
            lacking = set(SCHEMAS[kind].names) - set(pq.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if lacking:
            raise UserError(
                f"{path}: has no column {', '.join(sorted(lacking))}, which the log of each "
                f"{kind} has (docs/experiments.md); an earlier version wrote it?"
            )


def _versions(con: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for arm, version, day in con.sql(_VERSIONS).fetchall():
        found.setdefault(arm, []).append((version, day))
    return found


PerArm = dict[str, dict[str, PerUser]]
"""arm → metric → sums by user"""


def _per_user(con: duckdb.DuckDBPyConnection, experiment: Experiment) -> PerArm:
    """Of the arms that have users, users in two arms left out."""
    rows = con.sql(_USERS).fetchnumpy()
    arm, searches, shown, clicks, spent = (
        np.ma.filled(column, 0) if column.dtype.kind in "fiu" else np.asarray(column)
        for column in rows.values()
    )
    return {
        name: {
            "ctr": PerUser(clicks[own].astype(float), shown[own].astype(float)),
            "revenue": PerUser(spent[own].astype(float), searches[own].astype(float)),
        }
        for name in experiment.arms
        if len(own := np.flatnonzero(arm == name))
    }


def _buyers(metrics: dict[str, PerUser]) -> int:
    return int((metrics["revenue"].numerator > 0).sum())


def _arms(experiment: Experiment, per_user: PerArm, looked_for: float) -> dict[str, ArmResult]:
    control = per_user.get(experiment.control)
    found = {}
    for name, metrics in per_user.items():
        searches = int(metrics["revenue"].denominator.sum())
        lifts: dict[str, Effect] = {}
        if control is not None and name != experiment.control:
            lifts = {metric: lift(of, control[metric]) for metric, of in metrics.items()}
            if min(_buyers(metrics), _buyers(control)) < BUYERS:
                lifts["revenue"] = lifts["revenue"].unclaimed
        found[name] = ArmResult(
            users=len(metrics["ctr"].numerator),
            searches=searches,
            buyers=_buyers(metrics),
            values={metric: of.value for metric, of in metrics.items()},
            lifts=lifts,
            needed=needed(lifts["ctr"], looked_for) * searches if lifts else float("nan"),
        )
    return found


def _pairs(experiment: Experiment, per_user: PerArm) -> dict[str, dict[str, Effect]]:
    found: dict[str, dict[str, Effect]] = {}
    for first, second in combinations(experiment.arms[1:], 2):
        if first in per_user and second in per_user:
            effect = lift(per_user[second]["ctr"], per_user[first]["ctr"])
            found.setdefault(second, {})[first] = effect
    return found


def _mismatch(experiment: Experiment, per_user: PerArm) -> float:
    users = [len(per_user[a]["ctr"].numerator) if a in per_user else 0 for a in experiment.arms]
    return sample_ratio(np.array(users), np.array(experiment.shares))


def _interleaved(
    con: duckdb.DuckDBPyConnection, experiment: Experiment
) -> tuple[Effect | None, float, int]:
    if len(experiment.arms) != 2:
        return None, 1.0, 0
    a, b = map(_text, experiment.arms)
    score, decided = con.sql(_WINS.format(a=a, b=b)).fetchnumpy().values()
    if not len(score):
        return None, 1.0, 0
    found = preference(PerUser(score.astype(float), decided.astype(float)))
    return found, sign_test(score), len(score)


def _votes(con: duckdb.DuckDBPyConnection, experiment: Experiment) -> dict[str, Votes]:
    treatment, score, decided = (
        con.sql(_VOTES.format(control=_text(experiment.control))).fetchnumpy().values()
    )
    found = {}
    for name in experiment.arms[1:]:
        own = np.flatnonzero(treatment == name)
        if len(own):
            per_user = PerUser(score[own].astype(float), decided[own].astype(float))
            found[name] = Votes(
                preference(per_user), sign_test(score[own]), len(own), int(decided[own].sum())
            )
    return found


def report_text(readout: Readout, width: int = 128) -> str:
    """Table 2 of the paper, with intervals."""
    table = Table(
        title=f"{readout.name}: lifts over {readout.arm_names[0]} with 95 % interval, * where it "
        "excludes 0; CTR decides, revenue is beside it",
        title_justify="left",
    )
    table.add_column("arm", no_wrap=True)
    for name in (
        *("users", "searches", "CTR", "CTR lift", "revenue\na search", "revenue lift"),
        f"searches to\nsee {readout.looked_for:+.1%} CTR",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name, arm in readout.arms.items():
        table.add_row(
            name,
            f"{arm.users:,}",
            f"{arm.searches:,}",
            f"{arm.values['ctr']:.2%}",
            _cell(arm.lifts.get("ctr")),
            f"{arm.values['revenue']:.3f}",
            _cell(arm.lifts.get("revenue")),
            f"{arm.needed:,.0f}" if math.isfinite(arm.needed) else "-",
        )
    text = io.StringIO()
    if readout.arms:
        Console(width=width, file=text).print(table)
    return text.getvalue() + "".join(f"{line}\n" for line in _remarks(readout))


def _remarks(readout: Readout) -> list[str]:
    lines = [f"searches of {readout.first_day} to {readout.last_day} (UTC days)"]
    if readout.other_dealings:
        lines.append(
            f"{readout.other_dealings:,} searches in these days are left out: users were dealt by "
            "another salt, other arms, shares or another design then"
        )
    for arm, versions in readout.versions.items():
        if len(versions) > 1:
            told = ", ".join(f"{version} from {day} on" for version, day in versions)
            lines.append(
                f"{arm} was answered by {len(versions)} models ({told}): its numbers mix them; "
                "--from and --until choose the days of one"
            )
    if readout.dealt_otherwise:
        lines.append(
            "users were dealt by another salt, other shares, arms or another design than these "
            "settings say: give those of the service, or the next line is of the wrong shares"
        )
    if readout.arms and readout.mismatch_p < MISMATCH:
        lines.append(
            f"SAMPLE-RATIO MISMATCH (p = {readout.mismatch_p:.1e}): users are not as planned; "
            "find out what loses them; believe no lift above"
        )
    elif readout.arms:
        lines.append(f"users are dealt as planned (chi-square p = {readout.mismatch_p:.3f})")
    if few := [f"{name} has {arm.buyers:,}" for name, arm in readout.arms.items() if _few(arm)]:
        lines.append(
            f"no interval of a lift in revenue where an arm has fewer than {BUYERS} buyers "
            f"({', '.join(few)}): it would miss the truth too often"
        )
    for name, others in readout.pairs.items():
        lines += [f"CTR lift of {name} over {other} {_cell(o)}" for other, o in others.items()]
    if readout.users_in_two_arms:
        lines.append(f"{readout.users_in_two_arms:,} users were in two arms and are left out")
    if readout.preference is not None:
        control, treatment = readout.arm_names
        lines.append(
            f"interleaved: preference for {treatment} over {control} "
            f"{_cell(readout.preference).rstrip()}, "
            f"{_many(readout.interleaved_users, 'user')}, sign test p = {readout.preference_p:.2g}"
        )
    for name, votes in readout.votes.items():
        lines.append(
            f"votes: preference for {name} over {readout.arm_names[0]} "
            f"{_cell(votes.preference).rstrip()}, "
            f"{_many(votes.votes, 'vote')} of {_many(votes.reviewers, 'reviewer')}, "
            f"sign test p = {votes.p:.2g}"
        )
    if readout.not_shown:
        lines.append(
            f"{readout.not_shown:,} clicks or purchases were on products that their search did not "
            "show, and do not count"
        )
    if readout.without_search:
        lines.append(
            f"{readout.without_search:,} clicks or purchases belong to no search in the log: "
            "searches were lost, were deleted for their age, or are not in Parquet yet"
        )
    if readout.without_revenue:
        lines.append(
            f"{readout.without_revenue:,} purchases have no revenue, neither told nor the price of "
            "a product, and count as 0"
        )
    return lines


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _few(arm: ArmResult) -> bool:
    return arm.buyers < BUYERS


def effects_figure(readout: Readout, path: Path) -> None:
    """A dot with its 95 % interval for each treatment: lifts in both metrics, and the preference
    in interleaved lists, as far as the log has them."""
    panels = {
        f"lift in {label} [%]": {
            name: arm.lifts[metric] for name, arm in readout.arms.items() if arm.lifts
        }
        for metric, label in METRICS.items()
    }
    if readout.preference is not None:
        label = f"preference over {readout.arm_names[0]}, interleaved [%]"
        panels[label] = {readout.arm_names[1]: readout.preference}
    if readout.votes:
        label = f"preference over {readout.arm_names[0]}, votes [%]"
        panels[label] = {name: votes.preference for name, votes in readout.votes.items()}
    panels = {label: found for label, found in panels.items() if found}
    treatments = readout.arm_names[1:]
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels), 1.3 + 0.45 * len(treatments)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (label, found) in zip(grid[0], panels.items(), strict=True):
        for y, name in enumerate(treatments):
            if name in found:
                effect = found[name]
                bounds = [100 * effect.low, 100 * effect.high]
                axis.plot(bounds, [y, y], color=COLOUR, linewidth=3)
                axis.plot(100 * effect.value, y, "o", color=COLOUR, markersize=8)
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(f"{label}, 95 % interval")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_yticks(range(len(treatments)), treatments)
    grid[0, 0].set_ylim(len(treatments) - 0.4, -0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(readout: Readout, out: Path) -> None:
    """report.json, report.txt and, where there is something to compare, effects.png in `out`."""
    tree = json.dumps(asdict(readout), indent=2)
    known = json.loads(tree, parse_constant=lambda _: None)  # JSON knows no NaN
    (out / "report.json").write_text(json.dumps(known, indent=2) + "\n")
    (out / "report.txt").write_text(report_text(readout))
    lifts = any(arm.lifts for arm in readout.arms.values())
    if readout.preference is not None or readout.votes or lifts:
        effects_figure(readout, out / "effects.png")


def _cell(found: Effect | None) -> str:
    if found is None or math.isnan(found.value):
        return "-"
    if math.isnan(found.low):
        return f"{found.value:+.2%} (no interval)  "
    mark = " *" if found.found else "  "
    return f"{found.value:+.2%} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]{mark}"


def _read(paths: list[Path]) -> str:
    """A table of Parquet files alone: nothing of their paths, such as user=alice, is a column."""
    files = ", ".join(_text(str(path)) for path in paths)
    return f"read_parquet([{files}], hive_partitioning = false)"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
