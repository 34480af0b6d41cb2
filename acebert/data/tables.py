"""The Parquet files that ingest writes, but for products: their columns, types and row order."""

import pyarrow as pa

Table = tuple[str, pa.Schema]


def tables(leave_out: str) -> dict[str, Table]:
    """File name without .parquet → (query over ingest's tables, schema).

    `leave_out` is what a pair's hot list leaves out: 'day' or 'query'. Every query orders its
    rows, so that equal inputs give equal files.
    """
    return {
        "queries": (_QUERIES, _schema(query="int32", text="string", clicks="int64")),
        "pairs": (
            _PAIRS.format(held=leave_out),
            _schema(
                pair="int64",
                query="int32",
                product="int32",
                day="date32",
                clicks="int32",
                category_code="int32",
                hot_list="int32",
            ),
        ),
        **{
            f"{split}_pairs": (
                _EVAL_PAIRS.format(split=split),
                _schema(query="int32", product="int32", day="date32", clicks="int32"),
            )
            for split in ("valid", "test")
        },
        **{
            f"{split}_impressions": (
                _IMPRESSIONS.format(split=split),
                _schema(
                    search="int64",
                    query="int32",
                    product="int32",
                    position="int16",
                    clicked="bool",
                ),
            )
            for split in ("valid", "test")
        },
        "hot_lists": (
            "SELECT hot_list, queries FROM hot_lists ORDER BY hot_list",
            pa.schema([("hot_list", pa.int32()), ("queries", pa.list_(pa.int32()))]),
        ),
        "product_hot_lists": (
            "SELECT product, train, test FROM product_hot_lists ORDER BY product",
            _schema(product="int32", train="int32", test="int32"),
        ),
    }


def _schema(**types: str) -> pa.Schema:
    return pa.schema([(name, pa.type_for_alias(alias)) for name, alias in types.items()])


_QUERIES = "SELECT query, text, clicks FROM queries ORDER BY query"

_PAIRS = """
SELECT row_number() OVER (ORDER BY day, query, product) - 1 AS pair, query, product, day, clicks,
    category_code, coalesce(hot_list, 0) AS hot_list
FROM train_clicks JOIN (SELECT product, category_code FROM catalogue) USING (product)
    LEFT JOIN pair_hot_lists USING (product, {held})
ORDER BY pair
"""

_EVAL_PAIRS = """
SELECT query, product, day, clicks FROM {split}_clicks ORDER BY query, product
"""

# A search is one query under one search_id (a null one: the query's own group); numbered in the
# order in which searches begin.
_IMPRESSIONS = """
SELECT dense_rank() OVER (ORDER BY start) - 1 AS search, query, product, position, clicked
FROM (
    SELECT *, min(seq) OVER (PARTITION BY search_id, text) AS start
    FROM searched WHERE split = '{split}'
) JOIN queries USING (text)
ORDER BY search, seq
"""
