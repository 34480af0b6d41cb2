"""Ingest: a catalogue and a search log as users have them → numbered tables that stages train on.

    stage = ingest(settings, "products.parquet", "impressions/")

What is written, column for column, is in docs/architecture.md, 'ingest'. Steps:

1. products: read as text, checked, numbered (`catalogue`);
2. the log: streamed once into DuckDB on disk, each row with its meaning or a reason against it
   (`search_log`);
3. the split by time (`split`), then the robots: rows filtered, with the rule that filtered them;
4. queries numbered in the order of their text, clicks counted, hot lists (`hot_queries`);
5. files; products last, with their images.

Every row has one fate: kept, filtered or quarantined, and the three add up to the rows read.
User ids are hashed with a salt of this run as they come in, serve the robot filter, and are in no
output; nor is any column that `schema` does not name.

A log without timestamps needs validation and test logs of its own (data.valid_impressions,
data.test_impressions). Its days are then 1970-01-01 (train), -02 (validation) and -03 (test), and
since leaving out a pair's day would leave nothing, a pair's hot list leaves out the pair's own
query instead. With such files, timestamps serve the robot filter alone.

For what is served (`hold_out` false) all days train, and a product's hot list is of all of them;
the tables of validation and test are empty then.
"""

import json
import logging
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from acebert.config import DataSettings, Settings
from acebert.data.catalogue import RAW_PRODUCT, count_catalogue, load_products, write_products
from acebert.data.database import open_database, write_parquet
from acebert.data.hot_queries import build_hot_lists
from acebert.data.inputs import first_seen
from acebert.data.lookups import write_lookups
from acebert.data.quarantine import check_share, count_quarantined, write_quarantine
from acebert.data.schema import IMPRESSIONS, PRODUCTS, check_mapping
from acebert.data.search_log import (
    RAW_IMPRESSION,
    check_logs,
    count_fates,
    count_robots,
    decide_fates,
    load_log,
    rows_per_day,
)
from acebert.data.source import Source, SourceFile, check_mapped, find_files, open_source
from acebert.data.split import (
    FILE_DAYS,
    SPLITS,
    Days,
    check_clicks,
    choose_days,
    no_held_out_days,
)
from acebert.data.tables import tables
from acebert.errors import UserError
from acebert.workdir import Stage, digest_of, run_stage

log = logging.getLogger(__name__)

VERSION = 6
ROBOT_SHARE = 0.1  # of the log's rows: more of robots than this is worth a second look

Connection = duckdb.DuckDBPyConnection
Report = dict[str, Any]


def ingest(settings: Settings, products: str, impressions: str, *, hold_out: bool = True) -> Stage:
    """Read, check, split and count a catalogue and its log; reused when nothing has changed.

    `products` and `impressions` are files, directories or URIs (Parquet, CSV, JSON lines).
    Which files these are is what the job first saw (`acebert.data.inputs`). Days are days in UTC.
    Without `hold_out` no day validates or tests, whatever data.test_from says.

    Raises:
        UserError: an input that is not there, not readable, empty, lacks a column or has one of
            the wrong type; too many bad rows (the message says where they are kept); days that
            cannot be split; a split without clicks; too little memory or disk.
    """
    data = settings.data
    check_mapping(data.columns)
    where = {"products": products, "impressions": impressions}
    if data.valid_impressions and data.test_impressions:
        where["valid_impressions"] = data.valid_impressions
        where["test_impressions"] = data.test_impressions
    inputs = {
        name: first_seen(f"data.{name} {at}", partial(find_files, at, f"data.{name}"))
        for name, at in where.items()
    }
    key = {
        "version": VERSION,
        "inputs": {name: [file.fingerprint for file in files] for name, files in inputs.items()},
        # Where the files lie is in their fingerprints; memory changes no result.
        "data": data.model_dump(mode="json", exclude={*where, "memory_limit"}),
    }
    if not hold_out:
        key["held_out"] = "nothing"
    kept_aside = settings.workdir / "quarantine" / digest_of(key)

    def build(out: Path) -> None:
        sources = _open(inputs, data)
        with open_database(out / "scratch", data.memory_limit) as con:
            _build(con, data, where, sources, out, kept_aside, hold_out)

    return run_stage(settings.workdir, "ingest", key, build)


def _open(inputs: dict[str, list[SourceFile]], data: DataSettings) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    first = 0
    for name, files in inputs.items():
        spec = PRODUCTS if name == "products" else IMPRESSIONS
        sources[name] = open_source(files, f"data.{name}", spec, data.columns, first)
        first += len(files)
    check_mapped(sources.values(), data.columns)
    check_logs(_logs(sources))
    return sources


def _logs(sources: dict[str, Source]) -> dict[str, Source]:
    return {name: source for name, source in sources.items() if name != "products"}


def _build(
    con: Connection,
    data: DataSettings,
    where: dict[str, str],
    sources: dict[str, Source],
    out: Path,
    kept_aside: Path,
    hold_out: bool,
) -> None:
    logs = _logs(sources)
    _name_files(con, sources)

    load_products(con, sources["products"])
    products = count_catalogue(con, sources["products"])
    products |= _judge(
        con, "products", {"products": sources["products"]}, where, data, out, kept_aside
    )["products"]
    _say("products", products)

    load_log(con, logs)
    bad = _judge(con, "impressions", logs, where, data, out, kept_aside)
    if not hold_out:
        days = no_held_out_days(rows_per_day(con), where["impressions"])
    elif len(logs) == 1:
        days = choose_days(rows_per_day(con), data.test_from, where["impressions"])
    else:
        days = Days(valid=FILE_DAYS[1], test=FILE_DAYS[2])
    decide_fates(con, data, days)
    read = {name: counts | bad[name] for name, counts in count_fates(con, logs).items()}
    for name, counts in read.items():
        _say(name, counts)
    robots = count_robots(con)
    _warn_of_robots(robots, read)
    splits = _splits(con)
    if len(logs) > 1:  # the days of files are none of the calendar
        splits = {split: counts | {"first": None, "last": None} for split, counts in splits.items()}
    clicks = {split: counts["clicks"] for split, counts in splits.items()}
    check_clicks(clicks, where["impressions"], hold_out)
    _say_days(splits)

    _number_queries(con)
    leave_out: Literal["day", "query"] = "day" if len(logs) == 1 else "query"
    build_hot_lists(con, data.hot_queries, leave_out)
    rows = _write(con, leave_out, out)
    with_image = write_products(con, sources["products"], out / "products")

    last_days = [counts["last"] for counts in splits.values() if counts["last"]]
    report: Report = {
        "products_written": _written(sources["products"]),
        "log_until": max(last_days) if len(logs) == 1 else None,
        "products": products | {"without_image": products["rows_kept"] - with_image},
        **read,
        "robots": robots,
        "splits": splits,
        "has_negatives": all(splits[s]["rows"] > splits[s]["clicks"] for s in ("valid", "test")),
        "hot_lists_leave_out": f"the pair's own {leave_out}",
        "rows_written": rows,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")


def _written(products: Source) -> str | None:
    """When the oldest file of the catalogue was written, where its storage says so."""
    times = [file.mtime_ns for file in products.files if file.mtime_ns is not None]
    return datetime.fromtimestamp(min(times) / 1e9, UTC).isoformat() if times else None


def _name_files(con: Connection, sources: dict[str, Source]) -> None:
    """Table `files` (file, name): what the quarantine calls each of them."""
    numbered = [
        {"file": source.first_file + number, "name": file.name}
        for source in sources.values()
        for number, file in enumerate(source.files)
    ]
    schema = pa.schema([("file", pa.int64()), ("name", pa.string())])
    con.register("named", pa.Table.from_pylist(numbered, schema=schema))
    con.sql("CREATE TABLE files AS FROM named")
    con.unregister("named")


def _judge(
    con: Connection,
    kind: Literal["products", "impressions"],
    sources: dict[str, Source],
    where: dict[str, str],
    data: DataSettings,
    out: Path,
    kept_aside: Path,
) -> dict[str, Report]:
    """Quarantined rows of each input by reason; their rows go to out/quarantine, or, where an
    input has too many, to `kept_aside`, which outlives the failed stage."""
    table, raw = ("catalogue", RAW_PRODUCT) if kind == "products" else ("log", RAW_IMPRESSION)
    file = f"{kind}.parquet"
    found = {}
    try:
        for name, source in sources.items():
            read, bad = count_quarantined(con, table, source)
            check_share(source, where[name], read, bad, data.max_bad_share, kept_aside / file)
            found[name] = {"rows_quarantined": bad}
    except UserError:
        write_quarantine(con, table, raw, kept_aside / file)
        raise
    write_quarantine(con, table, raw, out / "quarantine" / file)
    return found


def _splits(con: Connection) -> dict[str, Report]:
    """For train, valid and test: first and last day with rows, their number, rows, clicks and
    searches (one query under one search_id on one day)."""
    sql = """
        SELECT split, min(day), max(day), count(DISTINCT day), count(*), count_if(clicked),
            count(DISTINCT (day, search_id, query))
        FROM fated WHERE filtered IS NULL GROUP BY split
    """
    found = {split: rest for split, *rest in con.sql(sql).fetchall()}
    names = ("first", "last", "days", "rows", "clicks", "searches")
    nothing = (None, None, 0, 0, 0, 0)
    return {s: dict(zip(names, found.get(s, nothing), strict=True)) for s in SPLITS}


def _number_queries(con: Connection) -> None:
    """Tables `queries` (query, text, clicks), `train_clicks`, `valid_clicks`, `test_clicks` (query,
    product, day, clicks) and `shown` (validation and test impressions).

    Queries are those that something refers to: clicked in training, or searched in validation or
    test. Numbered in the order of their text (by code point), so that ties by number are by text.
    """
    con.sql("""
        CREATE TABLE clicks AS
        SELECT split, query AS text, product, day, count(*) AS clicks
        FROM fated WHERE filtered IS NULL AND clicked GROUP BY split, query, product, day
    """)
    con.sql("""
        CREATE TABLE searched AS
        SELECT split, seq, query AS text, product, position, clicked, search_id
        FROM fated WHERE filtered IS NULL AND split <> 'train'
    """)
    con.sql("""
        CREATE TABLE queries AS
        SELECT CAST(row_number() OVER (ORDER BY text) - 1 AS INTEGER) AS query, text,
            coalesce(clicks, 0) AS clicks
        FROM (SELECT text FROM searched UNION SELECT text FROM clicks)
        LEFT JOIN (
            SELECT text, sum(clicks) AS clicks FROM clicks WHERE split = 'train' GROUP BY text
        ) USING (text)
    """)
    for split in SPLITS:
        con.sql(f"""
            CREATE TABLE {split}_clicks AS
            SELECT query, product, day, clicks.clicks
            FROM clicks JOIN queries USING (text) WHERE split = '{split}'
        """)


def _write(con: Connection, leave_out: str, out: Path) -> dict[str, int]:
    """All files but products, quarantine and report; rows of each for the report."""
    rows = {}
    for name, (sql, schema) in tables(leave_out).items():
        rows[name] = write_parquet(con, sql, out / f"{name}.parquet", schema)
        log.info("ingest: %s, %s rows", name, f"{rows[name]:,}")
    write_lookups(con, out)
    return rows


def _say(name: str, counts: Report) -> None:
    """products: 44,441 rows read, 44,441 kept, 0 filtered, 0 quarantined."""
    filtered, bad = counts.get("rows_filtered", {}), counts["rows_quarantined"]
    log.info(
        "%s: %s rows read, %s kept, %s filtered, %s quarantined",
        name,
        *(f"{n:,}" for n in (counts["rows_read"], counts["rows_kept"])),
        *(f"{sum(reasons.values()):,}" for reasons in (filtered, bad)),
    )
    for fate, reasons in (("filtered", filtered), ("quarantined", bad)):
        for reason, n in reasons.items():
            log.info("%s: %s %s: %s", name, f"{n:,}", fate, reason)


def _warn_of_robots(robots: dict[str, int], read: dict[str, Report]) -> None:
    total = sum(counts["rows_read"] for counts in read.values())
    rows = sum(
        n for counts in read.values() for why, n in counts["rows_filtered"].items() if why in robots
    )
    if rows > ROBOT_SHARE * total:
        log.warning(
            "robots: %.0f %% of the log, by %s user(s). If these are people (a shared account, a "
            "test user), raise --data.robot_clicks_per_minute or --data.robot_same_click",
            100 * rows / total,
            f"{sum(robots.values()):,}",
        )


def _say_days(splits: dict[str, Report]) -> None:
    for split, counts in splits.items():
        if not counts["days"]:
            continue
        span = str(counts["first"] or "given apart")
        span += f" to {counts['last']}" if counts["days"] > 1 else ""
        log.info(
            "%s: %s, %s rows, %s clicks",
            split,
            span,
            *(f"{counts[c]:,}" for c in ("rows", "clicks")),
        )
