"""What an experiment says: lifts by arm, or who wins in interleaved lists.

    readout = read_out(Experiment(...), workdir / "serving" / "events")

Read from the log's Parquet files by DuckDB, which spills to disk; only sums by user come to memory.
A search, and an action on one product of a search, count once however often they were logged.
Actions on searches or products that the log does not show count as strays and nowhere else; users
who were in two arms are left out and counted.
"""

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from acebert.errors import UserError
from acebert.experiment.assignment import Experiment
from acebert.experiment.statistics import (
    MISMATCH,
    Effect,
    PerUser,
    lift,
    preference,
    sample_ratio,
    sign_test,
)

METRICS = {"ctr": "CTR", "revenue": "revenue a search"}

_SEARCHES = """
CREATE TABLE searches AS
SELECT search_id, arm, "user", products, teams
FROM read_parquet({exposures}) WHERE experiment = {name}
QUALIFY row_number() OVER (PARTITION BY search_id ORDER BY "at") = 1
"""

_ACTIONS = """
CREATE TABLE actions AS
SELECT search_id, action, product_id, any_value(revenue) AS revenue,
    any_value(searches.teams[list_position(searches.products, product_id)]) AS team,
    bool_or(list_contains(searches.products, product_id)) AS shown
FROM (SELECT *, row_number() OVER (PARTITION BY search_id, action, product_id ORDER BY "at") AS nth
      FROM read_parquet({actions}))
JOIN searches USING (search_id) WHERE nth = 1 GROUP BY search_id, action, product_id
"""

_USERS = """
SELECT min(arm), count(DISTINCT arm), count(*), sum(len(products)), sum(clicks), sum(spent)
FROM searches LEFT JOIN (
    SELECT search_id, count(*) FILTER (action = 'click') AS clicks,
        sum(revenue) FILTER (action = 'purchase') AS spent
    FROM actions WHERE shown GROUP BY search_id
) USING (search_id) WHERE arm IS NOT NULL GROUP BY "user"
"""

_WINS = """
SELECT sum(sign(b - a)), count(*) FILTER (a <> b) FROM (
    SELECT "user", count(*) FILTER (team = {a}) AS a, count(*) FILTER (team = {b}) AS b
    FROM actions JOIN searches USING (search_id)
    WHERE shown AND action = 'click' AND searches.teams IS NOT NULL GROUP BY search_id, "user"
) GROUP BY "user" HAVING count(*) FILTER (a <> b) > 0
"""


@dataclass(frozen=True)
class ArmResult:
    """One arm of a split; `lifts` against the control, by metric, none for itself."""

    users: int
    searches: int
    values: dict[str, float]
    lifts: dict[str, Effect]


@dataclass(frozen=True)
class Readout:
    """What the log holds of an experiment."""

    name: str
    arms: dict[str, ArmResult]
    mismatch_p: float
    """of the users by arm under the planned shares; below MISMATCH no lift is to be believed"""
    preference: Effect | None
    """interleaved: of the second arm over the control, of the searches that one of them won"""
    preference_p: float
    """sign test over users"""
    interleaved_users: int
    users_in_two_arms: int


def read_out(experiment: Experiment, events: Path) -> Readout:
    """
    Raises:
        UserError: the log has no search of this experiment.
    """
    con = duckdb.connect()
    con.execute("SET preserve_insertion_order = false")
    exposures, actions = (
        sorted(events.glob(f"{kind}/*/*.parquet")) for kind in ("exposure", "action")
    )
    if not exposures:
        raise UserError(f"{events}: no search was logged there (replicas write every 30 s or so)")
    con.execute(_SEARCHES.format(exposures=_files(exposures), name=_text(experiment.name)))
    if not con.sql("SELECT count(*) FROM searches").fetchall()[0][0]:
        raise UserError(f"{events}: no search of an experiment {experiment.name!r}")
    if actions:
        con.execute(_ACTIONS.format(actions=_files(actions)))
    else:
        con.execute(
            "CREATE TABLE actions (search_id TEXT, action TEXT, product_id TEXT, revenue DOUBLE, "
            "team TEXT, shown BOOLEAN)"
        )
    rows = con.sql(_USERS).fetchnumpy()
    arm, arms_of_user, searches, shown, clicks, spent = (
        np.ma.filled(column, 0) if column.dtype.kind in "fiu" else np.asarray(column)
        for column in rows.values()
    )
    per_user = {
        name: {
            "ctr": PerUser(clicks[own].astype(float), shown[own].astype(float)),
            "revenue": PerUser(spent[own].astype(float), searches[own].astype(float)),
        }
        for name in experiment.arms
        if len(own := np.flatnonzero((arm == name) & (arms_of_user == 1)))
    }
    result = {
        name: ArmResult(
            len(metrics["ctr"].numerator),
            int(metrics["revenue"].denominator.sum()),
            {metric: of.value for metric, of in metrics.items()},
            {m: lift(of, per_user[experiment.control][m]) for m, of in metrics.items()}
            if name != experiment.control and experiment.control in per_user
            else {},
        )
        for name, metrics in per_user.items()
    }
    users = np.array(
        [len(per_user[a]["ctr"].numerator) if a in per_user else 0 for a in experiment.arms]
    )
    won, won_p, judges = _interleaved(con, experiment)
    return Readout(
        experiment.name,
        result,
        sample_ratio(users, np.array(experiment.shares)),
        won,
        won_p,
        judges,
        int((arms_of_user > 1).sum()),
    )


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


def report_text(readout: Readout, width: int = 110) -> str:
    """Table 2 of the paper, with intervals."""
    table = Table(
        title=f"{readout.name}: * where the 95 % interval excludes 0", title_justify="left"
    )
    for name in ("arm", "users", "searches", "CTR", "CTR lift", "revenue a search", "revenue lift"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    table.add_column("searches to see the CTR lift", justify="right")
    for name, arm in readout.arms.items():
        found = arm.lifts.get("ctr")
        enough = found is not None and math.isfinite(found.needed)
        table.add_row(
            name,
            f"{arm.users:,}",
            f"{arm.searches:,}",
            f"{arm.values['ctr']:.2%}",
            _cell(found),
            f"{arm.values['revenue']:.3f}",
            _cell(arm.lifts.get("revenue")),
            f"{found.needed * arm.searches:,.0f}" if found and enough else "-",
        )
    text = io.StringIO()
    if readout.arms:
        Console(width=width, file=text).print(table)
    lines = []
    if readout.arms and readout.mismatch_p < MISMATCH:
        lines.append(
            f"SAMPLE-RATIO MISMATCH (p = {readout.mismatch_p:.1e}): users are not as planned; "
            "find out what loses them; believe no lift above."
        )
    elif len(readout.arms) > 1:
        lines.append(f"users are dealt as planned (chi-square p = {readout.mismatch_p:.3f})")
    if readout.users_in_two_arms:
        lines.append(f"{readout.users_in_two_arms:,} users were in two arms and are left out")
    if readout.preference is not None:
        lines.append(
            f"interleaved: preference for the second arm {_cell(readout.preference)}, "
            f"{readout.interleaved_users:,} users, sign test p = {readout.preference_p:.3f}"
        )
    return text.getvalue() + "".join(f"{line}\n" for line in lines)


def lifts_figure(readout: Readout, path: Path) -> None:
    """A dot with its 95 % interval for each treatment and metric."""
    names = [name for name, arm in readout.arms.items() if arm.lifts]
    height = 1.3 + 0.45 * len(names)
    figure, axes = plt.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for y, name in enumerate(names):
            found = readout.arms[name].lifts[metric]
            axis.plot([100 * found.low, 100 * found.high], [y, y], color="#1f5fa8", linewidth=3)
            axis.plot(100 * found.value, y, "o", color="#1f5fa8", markersize=8)
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(f"lift in {METRICS[metric]} [%], 95 % interval")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(readout: Readout, out: Path) -> None:
    """report.json, report.txt and, where there is a lift, lifts.png under `out`."""
    tree = json.dumps(asdict(readout), indent=2)
    known = json.loads(tree, parse_constant=lambda _: None)  # JSON knows no NaN
    (out / "report.json").write_text(json.dumps(known, indent=2) + "\n")
    (out / "report.txt").write_text(report_text(readout))
    if any(arm.lifts for arm in readout.arms.values()):
        lifts_figure(readout, out / "lifts.png")


def _cell(found: Effect | None) -> str:
    if found is None or math.isnan(found.value):
        return "-"
    mark = " *" if found.found else "  "
    return f"{found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}]{mark}"


def _files(paths: list[Path]) -> str:
    return "[" + ", ".join(_text(str(path)) for path in paths) + "]"


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
