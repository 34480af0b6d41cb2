"""Hot queries (paper section 3.2): the queries with most clicks for a product, without the leak.

A product's list of all training days holds the own query of most training pairs, so a model that
reads it learns to copy. Each pair therefore also has a list in which the clicks of the pair's own
day are not counted (or, where the log has no days, the pair's own query is left out).

Such a list depends on (product, day) only, and is found without looking at all of the product's
queries: with n queries clicked on that day, it consists of those n with their other days' clicks,
and of the best of the rest, which are among the first K + n of all. So the work is linear in the
number of pairs.
"""

import logging
from typing import Literal

import duckdb

log = logging.getLogger(__name__)

CHUNK_PAIRS = 2_000_000  # pairs worked on at once: bounds the memory


def build_hot_lists(
    con: duckdb.DuckDBPyConnection, top: int, leave_out: Literal["day", "query"]
) -> int:
    """Lists of at most `top` query numbers, most clicked first, ties by query number.

    Reads tables `train_clicks`, `valid_clicks` (query, product, day, clicks; one row for each
    query, product and day) and `catalogue` (product, or null). Writes
    - `hot_lists` (hot_list, queries): distinct lists, numbered in their own order; 0 is empty;
    - `pair_hot_lists` (product, `leave_out`, hot_list): for training pairs, the product's list
      over training clicks without those of the pair's day (or query); no row: empty;
    - `product_hot_lists` (product, train, test): list of the training days, and of training and
      validation days, for every product.

    Returns the number of lists.
    """
    con.sql(
        f"CREATE TABLE pair_lists (product INTEGER, {leave_out} {_TYPE[leave_out]}, "
        "queries INTEGER[])"
    )
    con.sql("CREATE TABLE product_lists (product INTEGER, test BOOLEAN, queries INTEGER[])")
    pairs = con.sql("SELECT count(*) FROM train_clicks").fetchall()[0][0]
    chunks = -(-pairs // CHUNK_PAIRS)
    for chunk in range(chunks):
        where = f"product % {chunks} = {chunk}"
        con.sql(_PAIR_LISTS.format(top=top, held=leave_out, where=where))
        con.sql(_PRODUCT_LISTS.format(top=top, test="false", clicks="train_clicks", where=where))
        both = "(FROM train_clicks UNION ALL FROM valid_clicks)"
        con.sql(_PRODUCT_LISTS.format(top=top, test="true", clicks=both, where=where))
        if chunks > 1:
            log.info("hot queries: %d of %d parts", chunk + 1, chunks)
    con.sql(_NUMBERED)
    con.sql(_PAIR_NUMBERS.format(held=leave_out))
    con.sql(_PRODUCT_NUMBERS)
    return con.sql("SELECT count(*) FROM hot_lists").fetchall()[0][0]


_TYPE = {"day": "DATE", "query": "INTEGER"}

_PAIR_LISTS = """
INSERT INTO pair_lists
WITH held AS (
    SELECT product, {held} AS held, query, sum(clicks) AS clicks
    FROM train_clicks WHERE {where} GROUP BY product, {held}, query
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY product ORDER BY clicks DESC, query) AS rank
    FROM (SELECT product, query, sum(clicks) AS clicks FROM held GROUP BY product, query)
), reach AS (
    SELECT product, held, unnest(range(1, {top} + count(*) + 1)) AS rank
    FROM held GROUP BY product, held
), candidates AS (
    SELECT product, held.held, query, ranked.clicks - held.clicks AS clicks
    FROM held JOIN ranked USING (product, query) WHERE ranked.clicks > held.clicks
    UNION ALL
    SELECT product, held, query, clicks
    FROM reach JOIN ranked USING (product, rank) ANTI JOIN held USING (product, held, query)
), best AS (
    SELECT *, row_number() OVER (PARTITION BY product, held ORDER BY clicks DESC, query) AS place
    FROM candidates QUALIFY place <= {top}
)
SELECT product, held, list(query ORDER BY place) FROM best GROUP BY product, held
"""

_PRODUCT_LISTS = """
INSERT INTO product_lists
WITH best AS (
    SELECT product, query, row_number() OVER (
        PARTITION BY product ORDER BY sum(clicks) DESC, query) AS place
    FROM {clicks} WHERE {where} GROUP BY product, query QUALIFY place <= {top}
)
SELECT product, {test}, list(query ORDER BY place) FROM best GROUP BY product
"""

_NUMBERED = """
CREATE TABLE hot_lists AS
SELECT 0 AS hot_list, CAST([] AS INTEGER[]) AS queries
UNION ALL
SELECT row_number() OVER (ORDER BY queries), queries
FROM (SELECT queries FROM pair_lists UNION SELECT queries FROM product_lists)
"""

_PAIR_NUMBERS = """
CREATE TABLE pair_hot_lists AS
SELECT product, {held}, hot_list FROM pair_lists JOIN hot_lists USING (queries)
"""

_PRODUCT_NUMBERS = """
CREATE TABLE product_hot_lists AS
WITH numbered AS (
    SELECT product, max(hot_list) FILTER (NOT test) AS train, max(hot_list) FILTER (test) AS test
    FROM product_lists JOIN hot_lists USING (queries) GROUP BY product
)
SELECT product, coalesce(train, 0) AS train, coalesce(test, 0) AS test
FROM catalogue LEFT JOIN numbered USING (product) WHERE product IS NOT NULL
"""
