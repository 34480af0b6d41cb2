"""CSV and TSV as rows: every line of a file is in a row that is read, or is one with a problem.

A stray quote at the start of a CSV cell makes any parser swallow the lines up to the next quote and
call them one cell. So Arrow is given whole lines, a block at a time, and the rows that it makes are
counted against the lines. Where these are more, quoted cells hold line breaks, as RFC 4180 allows:
`_Parser._mend` tells those that mean it from those that swallowed rows, and of the latter gives up
the line that opens the quote alone.

TSV has no quoting (Hive, Spark and MySQL escape tabs and line breaks instead): a line is a row. A
cell that is quoted as a whole, as pandas and R write some, loses its quotes.
"""

import csv
import io
import logging
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

log = logging.getLogger(__name__)

BLOCK = 4 << 20  # bytes read and parsed at once
LONGEST = 4 << 20  # bytes of a row with line breaks in it
ACCIDENT = 6
"""Titles have commas too: in a title of several lines, fewer than this many where rows have theirs
do not make the lines rows."""

RAGGED = "not as many CSV fields as the header"
STRAY = "stray quote"

Rows = tuple[np.ndarray, pa.StringArray, dict[str, pa.StringArray]]
"""Row numbers in the file (from 1), problems (mostly null), and columns by our names."""

TAB = "\t"
LINE_END = re.compile(rb"\r\n?|\n")


def csv_header(stream: pa.NativeFile | io.BytesIO, delimiter: str) -> tuple[list[str], int]:
    """Names of the columns, and how many lines they take.

    Raises:
        csv.Error: a stray quote in the header.
    """
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as text:
        if delimiter == TAB:
            names = pa.array(text.readline().rstrip("\r\n").split(TAB))
            return _unquoted(names).fill_null("").to_pylist(), 1
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, [])
    if any(delimiter in name and len(name.splitlines()) > 1 for name in names):
        raise csv.Error("a quote in the header does not close on its line")
    return names, reader.line_num


def csv_rows(stream: pa.NativeFile, delimiter: str, texts: dict[str, str]) -> Iterator[Rows]:
    """All rows, a block at a time; those that cannot be taken apart come after their block's.

    Raises:
        csv.Error: a line that is too long for a row.
    """
    parser: _Parser | None = None
    rest = b""
    for data in chain(_read_ahead(stream), [b""]):
        block, rest = _cut(rest + data, last=not data)
        if block and parser is None:
            names, lines = csv_header(io.BytesIO(block), delimiter)
            block = b"".join(block.splitlines(keepends=True)[lines:])
            parser = _Parser(names, delimiter, texts)
        if block and parser is not None:
            rest = (yield from parser.rows(block, last=not data)) + rest
        if len(rest) > LONGEST + BLOCK:
            raise csv.Error(
                f"row {parser.done + 1 if parser else 1:,} is longer than {LONGEST >> 20} MB. Is "
                "there a line break after each row? Cells of that size belong in Parquet"
            )
    if parser is not None and parser.breaks:
        log.info("%s line breaks within quoted cells", f"{parser.breaks:,}")


def _read_ahead(stream: pa.NativeFile) -> Iterator[bytes]:
    """The stream's bytes; some are read while those before them are worked on."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(stream.read, BLOCK)
        while data := ahead.result():
            ahead = thread.submit(stream.read, BLOCK)
            yield data


def _cut(data: bytes, last: bool) -> tuple[bytes, bytes]:
    """Whole lines, and what is left; the `last` line of a file may lack its break."""
    if last:
        return data + b"\n" if data and not data.endswith((b"\n", b"\r")) else data, b""
    end = 1 + max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1))  # a final \r may be half a break
    return data[:end], data[end:]


class _Parser:
    """Blocks of whole lines → rows, for a file with these columns."""

    def __init__(self, names: list[str], delimiter: str, texts: dict[str, str]) -> None:
        self.names, self.delimiter, self.texts = names, delimiter, texts
        self.done = self.breaks = 0  # rows, and line breaks within their cells
        self.certain = ACCIDENT if "title" in texts else 1  # other cells hardly have line breaks
        # What replaces a line with a stray quote: a row with one field too many.
        self.mark = "\0" + delimiter * len(names)
        comma, more = re.escape(delimiter.encode()), len(names) - 1
        # What is repeated is atomic: else Python 3.11.2 (Debian 12) ends a match a byte too early.
        open_ = rb'"[^"]*+(?:(?>""[^"]*))*+'
        cell = rb'(?:%b"(?=[%b\r\n])|(?!")[^%b\r\n]*+)' % (open_, comma, comma)
        self.one_line_cells = re.compile(
            rb'(?:(?>[^"]+|(?<![^%b\r\n])"[^"\r\n]*+(?:(?>""[^"\r\n]*))*+"|(?<=[^%b\r\n])"))*+'
            % (comma, comma)
        )
        self.row = re.compile(rb"%b(?:%b%b){%d}(?:\r\n?|\n)" % (cell, comma, cell, more))
        self.open_row = re.compile(rb"(?:(?>%b%b)){0,%d}+%b\Z" % (cell, comma, more, open_))

    def rows(self, block: bytes, last: bool) -> Generator[Rows, None, bytes]:
        """Yields the block's rows; returns the lines of a row that does not end in it."""
        problems, columns, bad = self._parse(block)
        unfinished = b""
        if not self._lines_are_rows(block, len(problems) + len(bad)):
            block, breaks, unfinished = self._mend(block, last)
            self.breaks += breaks
            problems, columns, bad = self._parse(block)
            if len(problems) + len(bad) != _count_lines(block) - breaks:
                raise csv.Error(f"row {self.done + 1:,} or one soon after it: unclear quotes")
        total = len(problems) + len(bad)
        places = np.array([place for place, _ in bad], np.int64)
        yield np.delete(np.arange(total), places - 1) + self.done + 1, problems, columns
        yield places + self.done, pa.array([why for _, why in bad], pa.string()), {}
        self.done += total
        return unfinished

    def _parse(
        self, block: bytes
    ) -> tuple[pa.StringArray, dict[str, pa.StringArray], list[tuple[int, str]]]:
        """Problems and columns of the rows that have as many fields as the header; of all others
        the place in the block (from 1) and the problem."""
        bad: list[tuple[int, str]] = []

        def skip(row: pacsv.InvalidRow) -> str:
            bad.append((row.number, STRAY if row.text == self.mark else RAGGED))
            return "skip"

        if not block:
            return pa.nulls(0, pa.string()), {}, bad
        utf8 = _is_utf8(block)
        # A row that is not UTF-8 must fail alone: as Latin-1, all bytes come through.
        data = block if utf8 else block.decode("latin-1").encode()
        table = pacsv.read_csv(
            pa.BufferReader(data),
            # One block and one thread: only then does Arrow know row numbers.
            pacsv.ReadOptions(block_size=len(data) + 1, use_threads=False, column_names=self.names),
            pacsv.ParseOptions(
                delimiter=self.delimiter,
                quote_char=False if self.delimiter == TAB else '"',
                newlines_in_values=True,
                invalid_row_handler=skip,
            ),
            pacsv.ConvertOptions(
                include_columns=list(dict.fromkeys(self.texts.values())),
                column_types={name: pa.string() for name in self.texts.values()},
                strings_can_be_null=True,
                null_values=[""],
                check_utf8=False,
            ),
        )
        columns = {ours: _joined(table.column(theirs)) for ours, theirs in self.texts.items()}
        problems = pa.nulls(len(table), pa.string())
        if not utf8:
            problems, columns = _as_utf8(columns, len(table))
        if self.delimiter == TAB and b'"' in block:
            columns = {ours: _unquoted(column) for ours, column in columns.items()}
        return problems, columns, bad

    def _lines_are_rows(self, block: bytes, rows: int) -> bool:
        """Is each line but the blank ones a row of its own?"""
        if self.delimiter == TAB or b'"' not in block:
            return True
        if rows != _count_breaks(block) and rows != _count_lines(block):
            return False
        # Were the last line's quote open, no line would be missing yet.
        filled = block.rstrip(b"\r\n")
        start = 1 + max(filled.rfind(b"\n"), filled.rfind(b"\r"))
        return self._next_open(block, start) == len(block)

    def _next_open(self, block: bytes, at: int) -> int:
        """Where, from `at` on, the next quoted cell that goes beyond its line begins."""
        cells = self.one_line_cells.match(block, at)
        return cells.end() if cells else at

    def _mend(self, block: bytes, last: bool) -> tuple[bytes, int, bytes]:
        """The block with a mark for each line that has a stray quote; how many line breaks are left
        in its cells; and the lines of a row at its end that more of the file may complete."""
        mended: list[bytes] = []
        breaks = taken = at = start = 0  # start: of the row that opens a quote
        while (opened := self._next_open(block, at)) < len(block):
            ends = (1 + block.rfind(end, at, opened) for end in (b"\n", b"\r"))
            start = max(start, *ends)
            row = self.row.match(block, start)
            if row and len(row[0]) <= LONGEST and not self._are_rows(row[0]):
                breaks += _count_lines(row[0]) - 1
                at = start = row.end()
            elif not last and len(block) - start <= LONGEST and self.open_row.match(block, start):
                return b"".join([*mended, block[taken:start]]), breaks, block[start:]
            else:
                mended += block[taken:start], self.mark.encode(), b"\n"
                taken = at = start = next(LINE_END.finditer(block, start)).end()
        return b"".join([*mended, block[taken:]]), breaks, b""

    def _are_rows(self, row: bytes) -> bool:
        """Do the lines that one row covers look as if most of them were rows themselves?"""
        more = len(self.names) - 1
        separators = [line.count(self.delimiter.encode()) for line in row.splitlines() if line]
        alike = separators.count(more)
        return 2 * alike > len(separators) and alike * more >= self.certain


def _count_breaks(data: bytes) -> int:
    breaks = data.count(b"\n")
    return breaks + data.count(b"\r") - data.count(b"\r\n") if b"\r" in data else breaks


def _count_lines(data: bytes) -> int:
    """Lines that are not blank."""
    return sum(map(bool, data.splitlines()))


def _is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False


def _joined(column: pa.ChunkedArray) -> pa.StringArray:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _as_utf8(
    columns: dict[str, pa.StringArray], rows: int
) -> tuple[pa.StringArray, dict[str, pa.StringArray]]:
    """Text that was read as Latin-1 as the UTF-8 that it is; a row with a cell that is none loses
    the cell and has a problem."""
    problems: list[str | None] = [None] * rows
    decoded = {}
    for name, column in columns.items():
        cells = column.to_pylist()
        for row, cell in enumerate(cells):
            try:
                cells[row] = cell and cell.encode("latin-1").decode()
            except UnicodeDecodeError:
                cells[row], problems[row] = None, "not UTF-8"
        decoded[name] = pa.array(cells, pa.string())
    return pa.array(problems, pa.string()), decoded


def _unquoted(cells: pa.StringArray) -> pa.StringArray:
    """Cells without the quotes around them, if they have such; inner ones are then doubled."""
    inner = pc.replace_substring(pc.utf8_slice_codeunits(cells, 1, -1), '""', '"')
    quoted = pc.match_substring_regex(cells, r'\A"(?:[^"]|"")*"\z')
    cells = pc.if_else(quoted, inner, cells)
    return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
