"""A user's input: its files, which columns they have, and their rows as batches of text.

`find_files` lists (cheap: it makes the stage's key), `open_source` reads heads and checks columns,
`Source.batches` streams. Memory is bounded by a batch, whatever the size of a file or row group.

Rows that no reader can take apart (a CSV row with too few fields, a line that is no JSON) come out
like others, with all cells null and `problem` set: they are counted, not lost.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from acebert.data.csv_rows import Rows, csv_header, csv_rows
from acebert.data.schema import (
    Column,
    Kind,
    as_text,
    check_type,
    normalized,
    resolve,
    valid_text,
)
from acebert.errors import UserError

log = logging.getLogger(__name__)

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
COMPRESSIONS = {".gz", ".bz2", ".zst", ".lz4"}  # of CSV and JSON lines, as pyarrow names them
WANTED = "Parquet (.parquet), CSV (.csv, .tsv) or JSON lines (.jsonl, .ndjson, .json)"

BATCH_ROWS = 65_536
IMAGE_BATCH_ROWS = 250
JSON_PEEK = 1000  # lines of a JSON file that show which columns it has

ROW_BITS = 40
"""A row's place in an input, `seq`, is file number << ROW_BITS | row in the file (from 1)."""


@dataclass(frozen=True)
class SourceFile:
    """A file as the listing of its directory shows it."""

    name: str
    """path or URI, for messages"""
    path: str
    filesystem: pafs.FileSystem
    format: str
    size: int
    mtime_ns: int | None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the stage's key knows of the file: no byte of it is read."""
        return {"uri": self.name, "size": self.size, "mtime_ns": self.mtime_ns}


def find_files(where: str, setting: str) -> list[SourceFile]:
    """Data files at a path or URI, by name; a directory is searched through all its levels.

    In a directory, files of other formats and those whose name starts with '.' or '_' are skipped.

    Raises:
        UserError: nothing there, no data file there, or no such kind of URI; `setting` names the
            setting at fault.
    """
    prefix = ""
    try:
        if "://" in where:
            filesystem, path = pafs.FileSystem.from_uri(where)
            prefix = "" if where.startswith("file:") else where.split("://")[0] + "://"
        else:
            filesystem, path = pafs.LocalFileSystem(), str(Path(where).expanduser().absolute())
        info = filesystem.get_file_info(path)
    except (pa.ArrowInvalid, OSError, NotImplementedError) as error:
        raise UserError(f"--{setting} {where}: cannot be reached: {error}") from error
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"--{setting} {where}: there is no such file or directory")
    if info.type == pafs.FileType.Directory:
        inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        infos = sorted((i for i in inside if _is_data(i, path)), key=lambda i: i.path)
        if not infos:
            raise UserError(
                f"--{setting} {where}: no data file among the {len(inside)} entries of this "
                f"directory; {WANTED} are read"
            )
    elif format_of(path) is None:
        raise UserError(f"--{setting} {where}: unknown kind of file; {WANTED} are read")
    else:
        infos = [info]
    return [
        SourceFile(
            name=prefix + info.path,
            path=info.path,
            filesystem=filesystem,
            format=str(format_of(info.path)),
            size=info.size,
            mtime_ns=info.mtime_ns,
        )
        for info in infos
    ]


def _is_data(info: pafs.FileInfo, root: str) -> bool:
    inner = Path(info.path[len(root) :].lstrip("/"))
    hidden = any(part.startswith((".", "_")) for part in inner.parts)
    return info.type == pafs.FileType.File and not hidden and format_of(info.path) is not None


def format_of(path: str) -> str | None:
    """`parquet`, `csv`, `tsv` or `jsonl` by the name's ending, None for any other."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    if last in COMPRESSIONS:
        return FORMATS.get(inner) if FORMATS.get(inner) != "parquet" else None
    return FORMATS.get(last)


@dataclass(frozen=True)
class Source:
    """One input, heads read and columns found."""

    setting: str
    spec: tuple[Column, ...]
    files: list[SourceFile]
    present: list[dict[str, str]]
    """for each file: our column name → the file's"""
    names: list[list[str]]
    """for each file: all of its columns"""
    first_file: int
    """number of its first file: files are numbered through all inputs of a stage"""

    def has(self, column: str) -> bool:
        return any(column in found for found in self.present)

    @property
    def text_columns(self) -> list[str]:
        return [column.name for column in self.spec if column.kind is not Kind.BYTES]

    @property
    def schema(self) -> pa.Schema:
        """Of `batches`: `seq` int64, `problem` str or null, then every text column as str."""
        texts = [(name, pa.string()) for name in self.text_columns]
        return pa.schema([("seq", pa.int64()), ("problem", pa.string()), *texts])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, at most BATCH_ROWS or, of CSV, a few MB at a time; a lacking column is null.

        Raises:
            UserError: a file that cannot be read to its end; it names the file.
        """
        for number, (file, found) in enumerate(zip(self.files, self.present, strict=True)):
            base = (self.first_file + number) << ROW_BITS
            for rows, problems, columns in _rows(file, self._texts(file, found)):
                _check_late(file, found, rows, columns)
                arrays = [columns.get(n, _nulls(len(rows))) for n in self.text_columns]
                seq = pa.array(base + rows, pa.int64())
                yield pa.record_batch([seq, problems, *arrays], schema=self.schema)

    def _texts(self, file: SourceFile, found: dict[str, str]) -> dict[str, str]:
        texts = {ours: found[ours] for ours in self.text_columns if ours in found}
        if file.format == "jsonl":  # an object may have what the first ones lack
            texts |= {ours: ours for ours in self.text_columns if ours not in found}
        return texts

    def images(self) -> Iterator[pa.BinaryArray]:
        """The column `image` of all rows in the order of `batches`, a few at a time, undecoded."""
        for file, found in zip(self.files, self.present, strict=True):
            if "image" not in found:
                # The same columns: with others, a cell of several lines may be several rows.
                for rows, *_ in _rows(file, self._texts(file, found)):
                    yield pa.nulls(len(rows), pa.binary())
                continue
            try:
                # Images are there in Parquet only; other files were refused when opened.
                with _open_parquet(file) as parquet:
                    for batch in parquet.iter_batches(IMAGE_BATCH_ROWS, columns=[found["image"]]):
                        yield batch.column(0).cast(pa.binary())
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file.name}: cannot be read: {error}") from error


def open_source(
    files: list[SourceFile],
    setting: str,
    spec: tuple[Column, ...],
    columns: dict[str, str],
    first_file: int = 0,
) -> Source:
    """Look into every file's head: are the columns there, and of a fitting type?

    `columns` maps our names to theirs (the setting data.columns). Files of 0 bytes are passed
    over: they hold no row.

    Raises:
        UserError: a missing column or a wrong type (it names file and column), or an unreadable
            file.
    """
    files = [file for file in files if file.size > 0]
    present, all_names = [], []
    for file in files:
        try:
            schema = _parquet_schema(file) if file.format == "parquet" else None
            if schema is not None:
                names = schema.names
            else:
                names = _json_names(file) if file.format == "jsonl" else _csv_names(file)
            found = resolve(file.name, names, spec, columns)
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file.name}: is not readable as {file.format}: {error}") from error
        for column in spec:
            theirs = found.get(column.name)
            if theirs is not None and schema is not None:
                check_type(file.name, theirs, column.kind, schema.field(theirs).type)
            elif theirs is not None and column.kind is Kind.BYTES:
                raise UserError(
                    f"{file.name}: column {theirs!r}: text files hold no bytes. Bring images as a "
                    "binary column in Parquet, or give their addresses as image_uri"
                )
        present.append(found)
        all_names.append(names)
    return Source(setting, spec, files, present, all_names, first_file)


def check_mapped(sources: Iterable[Source], columns: dict[str, str]) -> None:
    """Say which mappings of data.columns are used.

    Raises:
        UserError: one is used in no file, though some have the column under our name: it would be
            read instead of the one that was meant.
    """
    for ours, theirs in columns.items():
        knowing = [s for s in sources if s.files and ours in {column.name for column in s.spec}]
        used = [
            file.name
            for source in knowing
            for file, found in zip(source.files, source.present, strict=True)
            if found.get(ours) == theirs
        ]
        if used:
            more = f" and {len(used) - 1:,} more" if used[1:] else ""
            log.info("data.columns: %s is %r in %s%s", ours, theirs, used[0], more)
        elif knowing:
            there = list(dict.fromkeys(chain(*(chain(*source.names) for source in knowing))))
            near = get_close_matches(theirs, there, cutoff=0.5) or there
            raise UserError(
                f"--data.columns {ours}={theirs}: there is no column {theirs!r} in "
                f"{knowing[0].files[0].name} or any other file that may have {ours}. "
                f"Columns there: {', '.join(near)}"
            )


def distinct_queries(where: str, setting: str, column: str) -> list[str]:
    """What a column of queries holds, each once as it was given, in the order of its first row.

    Raises:
        UserError: as `find_files`, `open_source` and `Source.batches`; no row at all; or one whose
            query has no visible character, by file and row.
    """
    spec = (Column(column, Kind.TEXT, required=True),)
    source = open_source(find_files(where, setting), setting, spec, {})
    texts: dict[str, None] = {}
    for batch in source.batches():
        blank = pc.equal(pc.coalesce(normalized(batch[column]), ""), "")
        if (first := blank.index(True).as_py()) >= 0:
            file, row = divmod(batch["seq"][first].as_py(), 1 << ROW_BITS)
            why = batch["problem"][first].as_py() or f"it has no {column}"
            raise UserError(f"--{setting} {source.files[file].name}: row {row:,}: {why}")
        texts |= dict.fromkeys(batch[column].to_pylist())
    if not texts:
        raise UserError(f"--{setting} {where}: there is no row")
    return list(texts)


def _nulls(n: int) -> pa.StringArray:
    return pa.nulls(n, pa.string())


def _rows(file: SourceFile, texts: dict[str, str]) -> Iterator[Rows]:
    """
    Raises:
        UserError: a file that cannot be read to its end; it names the file.
    """
    read = {"parquet": _parquet, "csv": _csv, "tsv": _csv, "jsonl": _json_lines}
    try:
        yield from read[file.format](file, texts)
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise UserError(f"{file.name}: cannot be read: {error}") from error


def _open_parquet(file: SourceFile) -> pq.ParquetFile:
    # Buffered and not pre-buffered: a huge row group is read piece by piece.
    return pq.ParquetFile(
        file.filesystem.open_input_file(file.path), buffer_size=1 << 20, pre_buffer=False
    )


def _parquet_schema(file: SourceFile) -> pa.Schema:
    with _open_parquet(file) as parquet:
        return parquet.schema_arrow


def _parquet(file: SourceFile, texts: dict[str, str]) -> Iterator[Rows]:
    with _open_parquet(file) as parquet:
        done = 0
        for batch in parquet.iter_batches(BATCH_ROWS, columns=list(texts.values())):
            n = batch.num_rows
            broken = np.zeros(n, bool)
            columns = {}
            for ours, theirs in texts.items():
                cells, those = valid_text(batch.column(theirs))
                columns[ours] = as_text(cells)
                broken |= those
            problems = _nulls(n)
            if broken.any():
                problems = pa.array(["not UTF-8" if b else None for b in broken], pa.string())
            yield np.arange(done + 1, done + n + 1), problems, columns
            done += n


def _stream(file: SourceFile) -> pa.NativeFile:
    return file.filesystem.open_input_stream(file.path, compression="detect")


def _delimiter(file: SourceFile) -> str:
    return "\t" if file.format == "tsv" else ","


def _csv_names(file: SourceFile) -> list[str]:
    return csv_header(_stream(file), _delimiter(file))[0]


def _csv(file: SourceFile, texts: dict[str, str]) -> Iterator[Rows]:
    return csv_rows(_stream(file), _delimiter(file), texts)


def _json_names(file: SourceFile) -> list[str]:
    with io.BufferedReader(_stream(file)) as stream:
        lines = [line for line in islice(stream, JSON_PEEK) if not line.isspace()]
    if lines and lines[0].lstrip().startswith(b"["):
        raise UserError(
            f"{file.name}: looks like one JSON array; JSON lines are wanted, one object a line "
            "(jq -c '.[]' makes them)"
        )
    return list(dict.fromkeys(name for line in lines for name in _object(line) or {}))


def _check_late(
    file: SourceFile, found: dict[str, str], rows: np.ndarray, columns: dict[str, pa.StringArray]
) -> None:
    """
    Raises:
        UserError: `clicked` occurs, in a file that was taken for one of clicks alone.
    """
    late = columns.get("clicked") if "clicked" not in found else None
    if late is not None and late.null_count < len(late):
        line = rows[late.is_valid().index(True).as_py()]
        raise UserError(
            f"{file.name}: 'clicked' first occurs in line {line:,}. What it means that earlier "
            f"rows lack it is told by the first {JSON_PEEK:,} lines: give it to one of them"
        )


def _json_lines(file: SourceFile, texts: dict[str, str]) -> Iterator[Rows]:
    with io.BufferedReader(_stream(file)) as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if not line.isspace())
        while part := list(islice(lines, BATCH_ROWS)):
            objects = [_object(line) for _, line in part]
            problems = ["not a JSON object" if row is None else None for row in objects]
            columns = {
                ours: pa.array([_cell((row or {}).get(theirs)) for row in objects], pa.string())
                for ours, theirs in texts.items()
            }
            rows = np.array([number for number, _ in part])
            yield rows, pa.array(problems, pa.string()), columns


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):  # both decoders' errors are ValueErrors
        return None
    return value if isinstance(value, dict) else None


def _cell(value: Any) -> str | None:
    """A JSON value as `schema.as_text` gives the same value from Parquet."""
    if value is None or value == "" or value != value:  # NaN, as pandas writes what is missing
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return json.dumps(value)  # true, 12, 12.5; what is nested stays as it is written
