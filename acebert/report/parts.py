"""What the report consists of: its tables as data, each with the paper's own numbers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from acebert.errors import UserError
from acebert.report import rows
from acebert.report.rows import System

PAPER_TABLE_1 = {
    "TwinBERT": {"gauc": 0.7695, "recall_10": 0.0362, "recall_50": 0.1016, "recall_100": 0.1492},
    "FashionBERT-Finetune": {
        **{"gauc": 0.7768, "recall_10": 0.0370, "recall_50": 0.1033, "recall_100": 0.1516}
    },
    "CE-BERT-Finetune": {
        **{"gauc": 0.7917, "recall_10": 0.0390, "recall_50": 0.1089, "recall_100": 0.1590}
    },
    "ACE-BERT": {"gauc": 0.7966, "recall_10": 0.0521, "recall_50": 0.1361, "recall_100": 0.1929},
}
PAPER_TABLE_3 = {
    "FashionBERT-Finetune": {"gauc": 0.7768, "recall_100": 0.1516},
    "RoI patches": {"gauc": 0.7816, "recall_100": 0.1530},
    "CE-BERT-Finetune": {"gauc": 0.7917, "recall_100": 0.1590},
}
PAPER_TABLE_4 = {
    "CE-BERT-Finetune": {"gauc": 0.7917, "recall_100": 0.1590},
    "CE-BERT + hot queries": {"gauc": 0.7934, "recall_100": 0.1885},
    "ACE-BERT": {"gauc": 0.7966, "recall_100": 0.1929},
}


@dataclass(frozen=True)
class Step:
    """A row set beside another, by their names."""

    row: str
    beside: str


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        key: its name in links; where it is a part by itself, on the command line and in MLflow too
        title, about: heading, and a sentence on what it shows
        metrics: its columns
        systems: its trained rows, from the top
        steps: which row is compared with which
        paper: row → metric → the paper's number
        groups: further columns for the clicks of some queries (`seen`, `unseen`)
        untrained: rows on top of them that are not ours, or need no training
        aliases: row → what this table calls it
    """

    key: str
    title: str
    about: str
    metrics: tuple[str, ...]
    systems: tuple[System, ...]
    steps: tuple[Step, ...]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)


BM25, CLICK_LOOKUP = rows.UNTRAINED["bm25_titles_hot"], rows.UNTRAINED["click_lookup"]
TABLE_1 = Table(
    key="table1",
    title="Table 1: the systems",
    about="From text alone to photos, hot queries and the adversary; above them what needs no "
    "training, below them what goes beyond the paper.",
    metrics=("gauc", "recall_10", "recall_50", "recall_100"),
    systems=(
        *(rows.TWINBERT, rows.TWINBERT_MLM, rows.FASHIONBERT, rows.CEBERT, rows.ACEBERT),
        *(rows.PLUS, rows.PLUS_CLICKS),
    ),
    steps=(
        Step(BM25, rows.UNTRAINED["bm25_titles"]),
        Step(rows.RIVAL, rows.ZERO_SHOT),
        Step("TwinBERT", rows.RIVAL),
        Step("TwinBERT + MLM", "TwinBERT"),
        Step("FashionBERT-Finetune", "TwinBERT"),
        Step("FashionBERT-Finetune", "TwinBERT + MLM"),
        Step("CE-BERT-Finetune", "FashionBERT-Finetune"),
        Step("ACE-BERT", "CE-BERT-Finetune"),
        Step("ACE-BERT", "TwinBERT"),
        Step("acebert_plus", "ACE-BERT"),
        Step("acebert_plus", rows.RIVAL),
        Step("acebert_plus", BM25),
        Step(rows.PLUS_CLICKS.name, "acebert_plus"),
        Step(rows.PLUS_CLICKS.name, CLICK_LOOKUP),
        Step(rows.PLUS_CLICKS.name, BM25),
    ),
    paper=PAPER_TABLE_1,
    groups=("seen", "unseen"),
    untrained=(*rows.UNTRAINED.values(), rows.ZERO_SHOT, rows.RIVAL),
)
TABLE_3 = Table(
    key="table3",
    title="Table 3: what the model reads of a photo",
    about="Patches of the whole photo, patches of the region of interest, and pixels beside them. "
    "Where rows are pre-trained, FashionBERT's has its paper's adaptive loss, the others the sum.",
    metrics=("gauc", "recall_100"),
    systems=(rows.FASHIONBERT, rows.ROI_PATCHES, rows.CEBERT),
    steps=(
        Step("RoI patches", "FashionBERT-Finetune"),
        Step("CE-BERT-Finetune", "RoI patches"),
    ),
    paper=PAPER_TABLE_3,
    aliases={
        "FashionBERT-Finetune": "patches (FashionBERT)",
        "CE-BERT-Finetune": "RoI patches and pixels (CE-BERT)",
    },
)
TABLE_4 = Table(
    key="table4",
    title="Table 4: hot queries and the adversary",
    about="What ACE-BERT adds to CE-BERT, one after the other.",
    metrics=("gauc", "recall_100"),
    systems=(rows.CEBERT, rows.HOT_QUERIES, rows.ACEBERT),
    steps=(
        Step("CE-BERT + hot queries", "CE-BERT-Finetune"),
        Step("ACE-BERT", "CE-BERT + hot queries"),
    ),
    paper=PAPER_TABLE_4,
    aliases={"CE-BERT-Finetune": "CE-BERT-Finetune", "ACE-BERT": "… + adversary (ACE-BERT)"},
)


def _beyond(
    key: str,
    title: str,
    about: str,
    *systems: System,
    more: tuple[Step, ...] = (),
    untrained: tuple[str, ...] = (),
) -> Table:
    """Variants of ACE-BERT, each beside ACE-BERT itself, and `more` steps."""
    return Table(
        key=key,
        title=title,
        about=about,
        metrics=("gauc", "recall_100"),
        systems=(rows.ACEBERT, *systems),
        steps=(*(Step(system.name, "ACE-BERT") for system in systems), *more),
        groups=("seen", "unseen"),
        untrained=untrained,
    )


BEYOND = (
    _beyond(
        "hot_queries",
        "The hot queries' leak",
        "A training pair's own query stands in its product's list, so that the model can copy it.",
        *(rows.OTHER_DAYS, rows.LIST_DROPPED, rows.BOTH),
    ),
    _beyond(
        "false_negatives",
        "In-batch negatives that were clicked",
        "The paper keeps them in the denominator.",
        *(rows.MASK_BATCH, rows.MASK_LOG),
    ),
    _beyond(
        "hard_negatives",
        "Mined negatives",
        "Products near the query for ACE-BERT itself and never clicked for it, one more for each "
        "pair.",
        *(rows.MINED, rows.MINED_MASKED),
        more=(Step(rows.MINED_MASKED.name, rows.MINED.name),),
    ),
    _beyond("gamma", "The smoothing γ of Eq. 4", "A constant, or learned.", rows.GAMMA_LEARNED),
    _beyond(
        "popularity",
        "Popularity of in-batch negatives",
        "What is clicked often is a negative often, which takes popularity out of the ranking.",
        rows.LOG_Q,
    ),
    _beyond(
        "dimensions",
        "Shorter embeddings",
        "One model, trained so that its first 64 and 32 dimensions are embeddings too.",
        *(rows.MATRYOSHKA, rows.MATRYOSHKA_64, rows.MATRYOSHKA_32),
        more=(
            Step(rows.MATRYOSHKA_64.name, rows.MATRYOSHKA.name),
            Step(rows.MATRYOSHKA_32.name, rows.MATRYOSHKA.name),
        ),
    ),
    _beyond(
        "adversary",
        "The adversary's form",
        "Minimax has no floor; confusion has one, and here the weight that acebert_plus gives it.",
        *(rows.CONFUSION, rows.NO_ADVERSARY),
    ),
    _beyond(
        "pixels",
        "What the pixels show",
        "The whole photo, or its region of interest.",
        rows.PIXELS_OF_ROI,
    ),
    _beyond(
        "hybrid",
        "Fused with BM25",
        "Reciprocal rank fusion with BM25 on titles and hot queries: teams add embeddings to a "
        "lexical engine, they rarely replace it. A fusion of lists has no scores, and so no GAUC.",
        *(rows.FUSED, rows.PLUS, rows.PLUS_FUSED),
        more=(Step(rows.PLUS_FUSED.name, rows.PLUS.name), Step(rows.FUSED.name, BM25)),
        untrained=(BM25,),
    ),
    _beyond(
        "past_clicks",
        "Past clicks, added when one searches",
        "What was clicked for the very query on earlier days raises a product's score, "
        "cosine + serve.click_weight · ln(1 + clicks): a table that any engine can keep. CE-BERT, "
        "which reads no hot queries, and acebert_plus beside ACE-BERT: what of their differences "
        "is left once the table is there.",
        *(rows.CEBERT, rows.CEBERT_CLICKS, rows.ACEBERT_CLICKS, rows.PLUS, rows.PLUS_CLICKS),
        more=(
            Step(rows.CEBERT_CLICKS.name, rows.CEBERT.name),
            Step(rows.PLUS_CLICKS.name, rows.PLUS.name),
            Step(rows.PLUS_CLICKS.name, rows.CEBERT_CLICKS.name),
            Step(rows.ACEBERT_CLICKS.name, rows.CEBERT_CLICKS.name),
            Step(rows.PLUS_CLICKS.name, rows.ACEBERT_CLICKS.name),
            Step(rows.CEBERT_CLICKS.name, CLICK_LOOKUP),
        ),
        untrained=(CLICK_LOOKUP,),
    ),
)
WITHOUT_ADVERSARY, WITH_ADVERSARY = rows.HOT_QUERIES, rows.ACEBERT
"""the two systems of Fig. 6 and 7"""
SWEPT = rows.ACEBERT
"""the system whose partition number Fig. 5 varies"""

PARTS = ("table1", "table3", "table4", "fig5", "fig6", "fig7", "beyond")
TABLES = {"table1": (TABLE_1,), "table3": (TABLE_3,), "table4": (TABLE_4,), "beyond": BEYOND}


def seeds_by_part(
    parts: Collection[str], seeds: Sequence[int], table1_seeds: Sequence[int] | None
) -> dict[str, tuple[int, ...]]:
    """The seeds of each of the parts, in the order of PARTS whatever theirs is.

    Raises:
        UserError: a seed is given twice, or Fig. 6 and 7 would find no seed that both of their
            systems have.
    """
    refuse_repeated("seeds", seeds)
    refuse_repeated("table1_seeds", table1_seeds or ())
    found = {part: tuple(seeds) for part in PARTS if part in parts}
    if "table1" in found and table1_seeds:
        found["table1"] = tuple(table1_seeds)
        if {"fig6", "fig7"} & set(parts) and not set(seeds) & set(table1_seeds):
            raise UserError(
                f"--table1_seeds {' '.join(map(str, table1_seeds))}: none is among --seeds, and "
                "Fig. 6 and 7 compare ACE-BERT with and without adversary seed by seed"
            )
    return found


def told_apart_by(parts: Collection[str]) -> set[str]:
    """Settings (`model.pixels`) by which rows of the parts are told apart: those in which the
    paper's systems differ, and those that variants change."""
    words = [
        word
        for part in parts
        for table in TABLES.get(part, ())
        for system in table.systems
        for word in system.changed
    ]
    changed = {word.removeprefix("--") for word in words if word.startswith("--")}
    return {*rows.WHAT_A_ROW_IS, *changed} - {"model.start"}


def refuse_repeated(name: str, seeds: Sequence[int]) -> None:
    """
    Raises:
        UserError: a seed is given twice.
    """
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--{name} {' '.join(map(str, seeds))}: a seed is given twice")


def systems_of(parts: Collection[str]) -> dict[str, list[System]]:
    """The trained systems that each of the parts needs, in the order of PARTS."""
    needed = {
        part: [s for table in TABLES.get(part, ()) for s in table.systems]
        for part in PARTS
        if part in parts
    }
    for part in ("fig6", "fig7"):
        if part in needed:
            needed[part] = [WITHOUT_ADVERSARY, WITH_ADVERSARY]
    return {part: list(dict.fromkeys(systems)) for part, systems in needed.items()}
