"""TREC run and qrels files, as trec_eval and ir-measures read them.

    run.trec:    query Q0 product rank score tag
    qrels.trec:  query 0 product grade

Fields are split at white space, so a query's id is its text, URL-quoted with '+' for a space, and
a product's id has white space and '%' quoted. Both read back as they were.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from acebert.errors import UserError

KEPT_IN_IDS = "!\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # all punctuation that quote() would change but '%'


class Judgement(NamedTuple):
    query: str
    product_id: str
    grade: int


def query_id(text: str) -> str:
    """`red shoes` → `red+shoes`."""
    return quote_plus(text)


def product_no(product_id: str) -> str:
    return quote(product_id, safe=KEPT_IN_IDS)


def write_run(
    path: Path,
    queries: Sequence[str],
    product_ids: Sequence[str],
    top: NDArray[np.int32],
    top_score: NDArray[np.float32],
    tag: str,
) -> None:
    """Write the best products of each query.

    Args:
        queries: texts [Q].
        product_ids: of the catalogue's rows [n].
        top, top_score: catalogue rows, best first, -1 for none, and scores [Q, depth].
        tag: the system's name.
    """
    numbers = [product_no(product_id) for product_id in product_ids]
    tag = quote(tag)
    with path.open("w", encoding="utf-8") as file:
        for text, rows, scores in zip(queries, top.tolist(), top_score.tolist(), strict=True):
            key = query_id(text)
            file.writelines(
                f"{key} Q0 {numbers[row]} {rank} {score:.7g} {tag}\n"
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
                if row >= 0
            )


def write_qrels(path: Path, judgements: Iterable[Judgement]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(
            f"{query_id(j.query)} 0 {product_no(j.product_id)} {j.grade}\n" for j in judgements
        )


def file_bytes(where: str | Path) -> bytes:
    """Of a file on this machine or behind a URI.

    Raises:
        UserError: it cannot be read.
    """
    filesystem: pafs.FileSystem = pafs.LocalFileSystem()
    try:
        path = str(where)
        if "://" in path:
            filesystem, path = pafs.FileSystem.from_uri(path)
        with filesystem.open_input_file(path) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: cannot be read ({error})") from error


def read_qrels(path: str | Path) -> list[Judgement]:
    """Read judged relevance, from a file or a URI.

    Raises:
        UserError: no such file, no judgement in it, or a line that is not one, by number.
    """
    rows = []
    for number, fields in _lines(path, 4, "query 0 product grade"):
        try:
            grade = int(fields[3])
        except ValueError:
            raise UserError(
                f"{path}, line {number}: the grade must be a whole number, got {fields[3]!r}"
            ) from None
        rows.append(Judgement(unquote_plus(fields[0]), unquote(fields[2]), grade))
    if not rows:
        raise UserError(f"{path}: holds no judgement")
    return rows


def _lines(path: str | Path, columns: int, layout: str) -> Iterable[tuple[int, list[str]]]:
    try:
        text = file_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as a TREC file: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != columns:
            raise UserError(
                f"{path}, line {number}: {len(fields)} columns instead of {columns} ({layout}); "
                "spaces in a query are written as '+'"
            )
        yield number, fields
