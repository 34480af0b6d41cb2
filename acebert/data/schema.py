"""The columns of a user's files, what their types may be, and what their text means.

Every cell is read as text first (`as_text`), whatever the file format, then given its meaning by
one SQL expression (`flag_sql`, `time_sql`, `number_sql`). So Parquet, CSV and JSON lines that hold
the same rows give the same result, and a quarantined row can be shown as it came.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from acebert.errors import UserError


class Kind(Enum):
    """What a column may hold; the value is how an error message says it."""

    TEXT = "text"
    ID = "text or whole numbers"
    FLAG = "booleans (true/false, t/f, yes/no, 0/1)"
    TIME = "timestamps, dates, ISO 8601 text or epoch numbers"
    NUMBER = "numbers"
    BYTES = "binary (the bytes of a JPEG, PNG or WebP file)"


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind
    required: bool = False


PRODUCTS = (
    Column("product_id", Kind.ID, required=True),
    Column("title", Kind.TEXT, required=True),
    Column("category", Kind.ID),
    Column("price", Kind.NUMBER),
    Column("listed_at", Kind.TIME),
    Column("image", Kind.BYTES),
    Column("image_uri", Kind.TEXT),
)
IMPRESSIONS = (
    Column("query", Kind.TEXT, required=True),
    Column("product_id", Kind.ID, required=True),
    Column("clicked", Kind.FLAG),
    Column("search_id", Kind.ID),
    Column("user_id", Kind.ID),
    Column("timestamp", Kind.TIME),
    Column("position", Kind.NUMBER),
)


JOINERS = "\u200c\u200d"
"""zero width, but Persian, Indic scripts and emoji are written with them"""


def normalize_query(text: str) -> str:
    """The form in which a query is stored, counted and searched: in ingest and in serving alike.

    Unicode NFKC and case folding, without characters that have no shape (Unicode's class Cf, such
    as a zero width space) but for the joiners that scripts are written with; then every run of
    white space one space, none at the ends. Idempotent. One without a visible character gives ''.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if not folded.isascii():
        seen = (c for c in folded if c in JOINERS or unicodedata.category(c) != "Cf")
        folded = unicodedata.normalize("NFKC", "".join(seen).casefold())
    words = folded.split()
    return " ".join(words) if any(word.strip(JOINERS) for word in words) else ""


def normalized(queries: pa.StringArray) -> pa.StringArray:
    """`normalize_query` of every non-null value; each distinct value is worked on once."""
    encoded = queries.dictionary_encode()
    texts = [normalize_query(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(texts, pa.string()).take(encoded.indices)


def check_mapping(columns: dict[str, str]) -> None:
    """
    Raises:
        UserError: `data.columns` maps a name that neither input has.
    """
    known = list(dict.fromkeys(column.name for column in (*PRODUCTS, *IMPRESSIONS)))
    for ours in columns:
        if ours not in known:
            raise UserError(
                f"--data.columns {ours}={columns[ours]}: there is no column {ours}. "
                f"Columns that can be mapped: {', '.join(known)}"
            )


def resolve(
    file: str,
    there: Iterable[str],
    spec: tuple[Column, ...],
    columns: dict[str, str],
) -> dict[str, str]:
    """Which of our columns the file has, and under which name: {ours: theirs}.

    Raises:
        UserError: a required column, or one that `columns` (the setting data.columns) names, is
            not there; or a name that is needed occurs twice.
    """
    names = list(there)
    found: dict[str, str] = {}
    for column in spec:
        ours, mapped = column.name, columns.get(column.name)
        # One mapping serves several files: a file may have the column under our name after all.
        theirs = mapped if mapped in names else ours
        if theirs in names:
            found[ours] = theirs
        elif column.required or mapped:
            raise UserError(
                f"{file}: there is no column {mapped or ours!r}. "
                f"Columns there: {', '.join(names) or 'none'}. "
                f"Say which one holds it: --data.columns {ours}=NAME"
            )
        if names.count(theirs) > 1:
            raise UserError(f"{file}: the column {theirs!r} occurs {names.count(theirs)} times")
    return found


def check_type(file: str, theirs: str, kind: Kind, type_: pa.DataType) -> None:
    """
    Raises:
        UserError: a column of this Arrow type cannot hold what `kind` says.
    """
    value = type_.value_type if pt.is_dictionary(type_) else type_
    text = _is_text(value)
    whole = pt.is_integer(value) or pt.is_floating(value) or pt.is_decimal(value)
    fits = {
        Kind.TEXT: text,
        Kind.ID: text or whole,
        Kind.FLAG: text or whole or pt.is_boolean(value),
        Kind.TIME: text or whole or pt.is_timestamp(value) or pt.is_date(value),
        Kind.NUMBER: text or whole,
        Kind.BYTES: pt.is_binary(value)
        or pt.is_large_binary(value)
        or pt.is_binary_view(value)
        or pt.is_fixed_size_binary(value),
    }[kind]
    if not (fits or pt.is_null(value)):
        raise UserError(f"{file}: column {theirs!r} is {type_}; it should hold {kind.value}")


def _is_text(type_: pa.DataType) -> bool:
    return pt.is_string(type_) or pt.is_large_string(type_) or pt.is_string_view(type_)


def valid_text(array: pa.Array) -> tuple[pa.Array, NDArray[np.bool_]]:
    """An array [n] with null for text that is no UTF-8, which no reader of Parquet looks at; and
    which cells these are [n]."""
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    broken = np.zeros(len(array), bool)
    if not _is_text(array.type):
        return array, broken
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        cells: list[str | None] = []
        for row, cell in enumerate(array.cast(pa.large_binary()).to_pylist()):
            try:
                cells.append(cell and cell.decode())
            except UnicodeDecodeError:
                cells.append(None)
                broken[row] = True
        array = pa.array(cells, pa.string())
    return array, broken


def as_text(array: pa.Array) -> pa.StringArray:
    """Any array that `check_type` lets through as text; null stays null, '' and NaN become null.

    Whole floats lose their '.0' (pandas writes integers with gaps as floats), so that ids meet.
    A time with a zone becomes UTC; one without is taken as UTC.
    """
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pt.is_timestamp(array.type):
        array = array.cast(pa.timestamp("us"), safe=False)  # with a zone: its UTC wall clock
    elif pt.is_floating(array.type):
        array = array.cast(pa.float64()) if pt.is_float16(array.type) else array
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        whole = pc.equal(pc.trunc(array), array)
        small = pc.less(pc.abs(array), 2.0**53)
        integers = pc.if_else(pc.and_(whole, small), array, None).cast(pa.int64())
        array = pc.coalesce(integers.cast(pa.string()), array.cast(pa.string()))
    text = array.cast(pa.string())
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def flag_sql(text: str) -> str:
    """DuckDB expression: the boolean that the text column `text` means, null if none."""
    word = f"lower(trim({text}))"
    return (
        f"CASE WHEN {word} IN ('true', 't', 'yes', 'y', '1', '1.0') THEN true "
        f"WHEN {word} IN ('false', 'f', 'no', 'n', '0', '0.0') THEN false END"
    )


def number_sql(text: str, type_: str) -> str:
    """DuckDB expression: the finite number that the text means, as SQL type `type_`, else null."""
    value = f"TRY_CAST({text} AS DOUBLE)"
    return f"CASE WHEN isfinite({value}) THEN TRY_CAST({value} AS {type_}) END"


def time_sql(text: str) -> str:
    """DuckDB expression: TIMESTAMP in UTC [µs] that the text means, null if none.

    ISO 8601 with or without offset or zone name (without: UTC), YYYYMMDD, or an epoch number in
    seconds, ms, µs or ns, told apart by its size. The connection's TimeZone must be UTC. Wrap
    what it gives in `plausible_sql`.
    """
    value = f"TRY_CAST({text} AS DOUBLE)"
    micros = (
        f"CASE WHEN abs({value}) < 1e11 THEN {value} * 1e6 WHEN abs({value}) < 1e14 "
        f"THEN {value} * 1e3 WHEN abs({value}) < 1e17 THEN {value} ELSE {value} / 1e3 END"
    )
    return (
        f"CASE WHEN contains({text}, '-') THEN CAST(TRY_CAST({text} AS TIMESTAMPTZ) AS TIMESTAMP) "
        f"WHEN length({text}) = 8 THEN try_strptime({text}, '%Y%m%d') "
        f"ELSE make_timestamp(TRY_CAST({micros} AS BIGINT)) END"
    )


def plausible_sql(time: str) -> str:
    """DuckDB expression: the time if it lies in the years 1970 to 2261 (what 64 bits of ns hold);
    others are taken for mistakes: null. (Apart from `time_sql`, or it would be computed twice.)
    """
    return f"CASE WHEN year({time}) BETWEEN 1970 AND 2261 THEN {time} END"
