"""The search log of ingest: what each row means, and its fate: kept, filtered or quarantined.

`load_log` streams the rows into the table `log`; `decide_fates` adds the view `fated`, in which
`filtered` is null for rows that are kept and quarantined rows are absent.
"""

import logging
import secrets
import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import duckdb
import pyarrow as pa

from acebert.config import DataSettings
from acebert.data.database import feed
from acebert.data.schema import flag_sql, normalized, number_sql, plausible_sql, time_sql
from acebert.data.source import Source
from acebert.data.split import FILE_DAYS, Days
from acebert.errors import UserError

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0

Report = dict[str, Any]

RAW_IMPRESSION = ("query", "product_id", "clicked", "search_id", "timestamp", "position")
"""Columns of a quarantined row: all that are read but the user's id."""


def check_logs(logs: dict[str, Source]) -> None:
    """
    Raises:
        UserError: no row at all is there; timestamps are in some files only, `clicked` likewise;
            or nothing to split by: neither timestamps nor validation and test logs.
    """
    for source in logs.values():
        for column in ("timestamp", "clicked"):
            lacking = [
                file.name
                for file, found in zip(source.files, source.present, strict=True)
                if column not in found
            ]
            if lacking and source.has(column):
                raise UserError(
                    f"{lacking[0]}: there is no column {column!r}, but other files of "
                    f"--{source.setting} have it. All of them need it, or none"
                )
    main = logs["impressions"]
    if len(logs) == 1 and main.files and not main.has("timestamp"):
        raise UserError(
            f"{main.files[0].name}: there is no column 'timestamp' to split the log by. Say which "
            "one holds it (--data.columns timestamp=NAME), or give validation and test logs of "
            "their own (--data.valid_impressions, --data.test_impressions)"
        )
    for source in logs.values():
        if source.files and not source.has("clicked"):
            log.warning(
                "%s: no column 'clicked': every row counts as a click (a column of another name? "
                "--data.columns clicked=NAME)",
                source.setting,
            )


def load_log(con: duckdb.DuckDBPyConnection, logs: dict[str, Source]) -> None:
    """Stream all logs into the table `log`, one row for each of theirs.

    Columns: seq, input (its place among `logs`), reason (null: usable), raw (as text, of
    quarantined rows only), query (normalised), product, clicked, time (of clicks), day, position,
    search_id, person (salted hash of user_id), unreadable_position.
    """
    con.sql(_TABLE)
    salt = secrets.token_hex(16)  # of this run only: the hashes mean nothing outside it
    timed = len(logs) == 1
    for number, (name, source) in enumerate(logs.items()):
        clicked = flag_sql("clicked") if source.has("clicked") else "true"
        sql = _INSERT.format(
            input=number,
            clicked=clicked,
            time=time_sql("timestamp"),
            plausible=plausible_sql("instant"),
            timed=timed,
            day="CAST(time AS DATE)" if timed else f"DATE '{FILE_DAYS[number]}'",
            position=number_sql("position", "SMALLINT"),
            raw=", ".join(f"{column}: {column}" for column in RAW_IMPRESSION),
            salt=salt,
        )
        schema = source.schema.append(pa.field("text", pa.string()))
        feed(con, sql, _normalized(source, name), schema)


_TABLE = """
CREATE TABLE log (
    seq BIGINT, input UTINYINT, reason VARCHAR,
    raw STRUCT(query VARCHAR, product_id VARCHAR, clicked VARCHAR, search_id VARCHAR,
               "timestamp" VARCHAR, "position" VARCHAR),
    query VARCHAR, product INTEGER, clicked BOOLEAN, time TIMESTAMP, day DATE,
    "position" SMALLINT, search_id VARCHAR, person UBIGINT, unreadable_position BOOLEAN
)
"""

_INSERT = """
INSERT INTO log
WITH typed AS (
    SELECT seq, problem, text, search_id, user_id, product,
        {{{raw}}} AS raw, query, product_id, timestamp, position,
        {clicked} AS is_clicked, {time} AS instant, {position} AS place
    FROM incoming LEFT JOIN (SELECT product_id, product FROM catalogue WHERE reason IS NULL)
        USING (product_id)
), plausible AS (
    SELECT *, {plausible} AS time FROM typed
), judged AS (
    SELECT *, CASE
        WHEN problem IS NOT NULL THEN problem
        WHEN query IS NULL THEN 'no query'
        WHEN text = '' THEN 'query of white space only'
        WHEN product_id IS NULL THEN 'no product_id'
        WHEN product IS NULL THEN 'unknown product'
        WHEN is_clicked IS NULL THEN 'clicked is not a boolean'
        WHEN {timed} AND timestamp IS NULL THEN 'no timestamp'
        WHEN {timed} AND time IS NULL THEN 'bad timestamp'
    END AS reason FROM plausible
)
SELECT seq, {input}, reason, CASE WHEN reason IS NOT NULL THEN raw END, text, product, is_clicked,
    CASE WHEN is_clicked THEN time END, {day}, place, search_id,
    CASE WHEN user_id IS NOT NULL THEN hash(user_id || '{salt}') END,
    position IS NOT NULL AND place IS NULL
FROM judged
"""


def _normalized(source: Source, name: str) -> Iterator[pa.RecordBatch]:
    rows, last = 0, time.monotonic()
    for batch in source.batches():
        yield batch.append_column("text", normalized(batch.column("query")))
        rows += batch.num_rows
        if time.monotonic() - last > PROGRESS_SECONDS:
            log.info("%s: %s rows read so far", name, f"{rows:,}")
            last = time.monotonic()


def rows_per_day(con: duckdb.DuckDBPyConnection) -> dict[date, int]:
    """Usable rows on each day."""
    sql = "SELECT day, count(*) FROM log WHERE reason IS NULL GROUP BY day ORDER BY day"
    return dict(con.sql(sql).fetchall())


def decide_fates(con: duckdb.DuckDBPyConnection, data: DataSettings, days: Days) -> None:
    """View `fated`: usable rows of `log` with `split` ('train', 'valid', 'test') and `filtered`,
    null for what is kept, else the filter's name.

    A robot is a user who, in one minute, clicks more than data.robot_clicks_per_minute times, or
    on one day clicks one product for one query more than data.robot_same_click times. All rows of
    its split and of later ones are filtered: what a user does on the test day changes no training.
    Rows without user or time are never a robot's.
    """
    con.sql(
        _ROBOTS.format(
            test=days.test,
            per_minute=data.robot_clicks_per_minute,
            same_click=data.robot_same_click,
        )
    )
    con.sql(_FATED.format(valid=days.valid, test=days.test))


_ROBOTS = """
CREATE TABLE robots AS
WITH clicks AS (
    FROM log WHERE reason IS NULL AND clicked AND day <= '{test}'
        AND person IS NOT NULL AND time IS NOT NULL
), caught AS (
    SELECT person, 'robot: more than {per_minute} clicks in a minute' AS rule, min(day) AS day
    FROM clicks GROUP BY person, date_trunc('minute', time) HAVING count(*) > {per_minute}
    UNION ALL
    SELECT person, 'robot: the same click more than {same_click} times in a day', min(day)
    FROM clicks GROUP BY person, CAST(time AS DATE), query, product HAVING count(*) > {same_click}
)
SELECT person, min(rule) AS rule, min(day) AS since FROM caught GROUP BY person
"""

_FATED = """
CREATE VIEW fated AS
SELECT seq, input, query, product, clicked, day, position, search_id, person, unreadable_position,
    CASE WHEN day = '{test}' THEN 'test' WHEN day = '{valid}' THEN 'valid' ELSE 'train' END
        AS split,
    CASE WHEN day > '{test}' THEN 'after the test day'
        WHEN since < '{valid}' OR (since = '{valid}' AND day >= since) OR day = '{test}' THEN rule
    END AS filtered
FROM log LEFT JOIN robots USING (person) WHERE reason IS NULL
"""


def count_fates(con: duckdb.DuckDBPyConnection, logs: dict[str, Source]) -> dict[str, Report]:
    """For each log: rows read, kept, and filtered by reason; cells that were no position."""
    report = {}
    for number, (name, source) in enumerate(logs.items()):
        read, unreadable = con.sql(
            f"SELECT count(*), count_if(unreadable_position) FROM log WHERE input = {number}"
        ).fetchall()[0]
        filtered = con.sql(
            f"SELECT filtered, count(*) FROM fated WHERE input = {number} GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        report[name] = {
            "files": len(source.files),
            "rows_read": read,
            "rows_kept": dict(filtered).get(None, 0),
            "rows_filtered": {reason: n for reason, n in filtered if reason is not None},
            "cells_unreadable": {"position": unreadable},
        }
    return report


def count_robots(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Users that each rule caught; a user whom both catch is counted by the first."""
    return dict(con.sql("SELECT rule, count(*) FROM robots GROUP BY rule ORDER BY rule").fetchall())
