"""The split by time: the test day, the day before it for validation, all before that to train.

What is served learns nothing more from days that are held out: there, all days train."""

from dataclasses import dataclass
from datetime import date, timedelta

from acebert.errors import UserError

ONE_DAY = timedelta(days=1)
SPLITS = ("train", "valid", "test")

FILE_DAYS = (date(1970, 1, 1), date(1970, 1, 2), date(1970, 1, 3))
"""Train, validation and test 'day' of a log whose splits are files of their own."""


@dataclass(frozen=True)
class Days:
    """Days are dates in UTC. Rows after `test` belong to no split."""

    valid: date
    test: date


def choose_days(rows: dict[date, int], test_from: date | None, log: str) -> Days:
    """Validation and test day of a log with so many good rows on each day.

    The test day is `test_from`, or the last day there is. Validation is the calendar day before.

    Raises:
        UserError: fewer than three days; `test_from` after the last day or before the third; no
            row on one of the two days, or none before them. `log` names the log.
    """
    if not rows:
        raise UserError(f"{log}: no usable row, so there are no days to split by")
    first, last = min(rows), max(rows)
    span = f"{log}: the log goes from {first} to {last}"
    if (last - first).days < 2:
        raise UserError(
            f"{span}; a split by time needs three days: one to train, then validation, then test. "
            "Or give --data.valid_impressions and --data.test_impressions"
        )
    test = test_from or last
    if test > last:
        raise UserError(f"--data.test_from {test} is after the last day. {span}")
    if (test - first).days < 2:
        raise UserError(
            f"--data.test_from {test} leaves no day to train: it has to be {first + 2 * ONE_DAY} "
            f"or later. {span}"
        )
    valid = test - ONE_DAY
    for day, use in ((test, "the test day"), (valid, "the validation day, the one before test")):
        if day not in rows:
            raise UserError(
                f"{log}: no row on {day}, {use}. Days with rows: {_list(sorted(rows))}. "
                "Choose another --data.test_from"
            )
    return Days(valid=valid, test=test)


def no_held_out_days(rows: dict[date, int], log: str) -> Days:
    """Days that lie after the log, so that all of it trains.

    Raises:
        UserError: there is no row. `log` names the log.
    """
    if not rows:
        raise UserError(f"{log}: no usable row, so there is nothing to take hot queries from")
    last = max(rows)
    return Days(valid=last + ONE_DAY, test=last + 2 * ONE_DAY)


def check_clicks(clicks: dict[str, int], log: str, hold_out: bool) -> None:
    """
    Raises:
        UserError: no click to train, or, where days are held out, none on one of these: nothing
            could be learned or measured there.
    """
    empty = [split for split in SPLITS[: None if hold_out else 1] if not clicks.get(split)]
    if empty and not hold_out:
        raise UserError(f"{log}: no click in it, so there are no hot queries")
    if empty:
        counts = ", ".join(f"{split} {clicks.get(split, 0):,}" for split in SPLITS)
        raise UserError(
            f"{log}: no click in {' and '.join(empty)} (clicks: {counts}). Each of train, "
            "validation and test needs some"
        )


def _list(days: list[date]) -> str:
    """Days with consecutive ones drawn together: 2026-01-01 to 2026-01-05, 2026-01-09."""
    runs: list[list[date]] = []
    for day in days:
        if runs and day - runs[-1][-1] == ONE_DAY:
            runs[-1].append(day)
        else:
            runs.append([day])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
