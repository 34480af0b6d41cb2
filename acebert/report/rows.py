"""The systems of the report: which recipe, with which settings changed.

A system is trained once, whatever tables it stands in. Its changes win over the command line, for
they are what it is.
"""

from dataclasses import dataclass

from acebert.evaluation import HYBRID, WITH_CLICKS

WHAT_A_ROW_IS = (
    *("image.roi", "model.patches", "model.pixels", "model.hot_queries", "model.hot_query_dropout"),
    *("loss.false_negatives", "loss.popularity_correction", "adversary.form", "adversary.weight"),
    *("pretrain.adaptive_loss", "pretrain.queries"),
)
"""settings in which the recipes of the paper's systems differ"""


@dataclass(frozen=True)
class System:
    """A row that is trained, or made of one that is.

    Attributes:
        name: as the page writes it
        recipe: under acebert/recipes, without `_tiny`
        changed: settings, as on the command line
        part: directory of the model's evaluation that is the row: fused with BM25, with past
            clicks (none: the model by itself)
        miner: whose model mines its hard negatives (none: its own without them)
    """

    name: str
    recipe: str
    changed: tuple[str, ...] = ()
    part: str = ""
    miner: "System | None" = None


TWINBERT = System("TwinBERT", "twinbert", ("--model.start", "backbone"))
TWINBERT_MLM = System("TwinBERT + MLM", "twinbert_mlm", ("--model.start", "pretrain"))
FASHIONBERT = System("FashionBERT-Finetune", "fashionbert")
ROI_PATCHES = System("RoI patches", "cebert", ("--model.pixels", "false"))
CEBERT = System("CE-BERT-Finetune", "cebert")
HOT_QUERIES = System("CE-BERT + hot queries", "acebert", ("--adversary.form", "off"))
ACEBERT = System("ACE-BERT", "acebert")
PLUS = System("acebert_plus", "acebert_plus")
PLUS_CLICKS = System("acebert_plus + past clicks", "acebert_plus", part=WITH_CLICKS)
CEBERT_CLICKS = System("CE-BERT + past clicks", "cebert", part=WITH_CLICKS)


def _but(name: str, *changed: str, part: str = "", miner: System | None = None) -> System:
    """ACE-BERT with some settings changed."""
    return System(name, "acebert", changed, part, miner)


OTHER_DAYS = _but("own day left out", "--model.hot_queries", "other_days")
LIST_DROPPED = _but("list left out for 15 %", "--model.hot_query_dropout", "0.15")
BOTH = _but(
    "both",
    *("--model.hot_queries", "other_days", "--model.hot_query_dropout", "0.15"),
)
MASK_BATCH = _but("mask: clicks of the batch", "--loss.false_negatives", "batch")
MASK_LOG = _but("mask: clicks of the whole log", "--loss.false_negatives", "log")
MINED = _but("one mined negative a pair", "--loss.hard_negatives", "1")
MINED_MASKED = _but(
    "the same, clicks of the log masked",
    *("--loss.hard_negatives", "1", "--loss.false_negatives", "log"),
    miner=ACEBERT,  # the other row's, so that the mask is all that differs
)
GAMMA_LEARNED = _but("γ learned", "--loss.gamma_learned", "true")
LOG_Q = _but("popularity corrected (logQ)", "--loss.popularity_correction", "true")
NESTED = ("--loss.matryoshka_dims", "64", "--loss.matryoshka_dims", "32")
MATRYOSHKA = _but("Matryoshka, all dimensions", *NESTED)
MATRYOSHKA_64 = _but("Matryoshka, cut to 64", *NESTED, "--eval.dimensions", "64")
MATRYOSHKA_32 = _but("Matryoshka, cut to 32", *NESTED, "--eval.dimensions", "32")
CONFUSION = _but(
    "adversary: confusion, λ 0.1",  # as acebert_plus has it
    *("--adversary.form", "confusion", "--adversary.weight", "0.1"),
)
NO_ADVERSARY = _but("adversary: off", "--adversary.form", "off")
PIXELS_OF_ROI = _but("pixels of the RoI", "--image.pixel_source", "roi")
FUSED = _but("ACE-BERT + BM25", part=HYBRID)
PLUS_FUSED = System("acebert_plus + BM25", "acebert_plus", part=HYBRID)
ACEBERT_CLICKS = _but("ACE-BERT + past clicks", part=WITH_CLICKS)

UNTRAINED = {
    "bm25_titles": "BM25, titles",
    "bm25_titles_hot": "BM25, titles + hot queries",
    "click_lookup": "click look-up",
    "popularity": "popularity",
    "position": "the engine's own order",
}
"""rows of `acebert.evaluation.evaluate.BASELINES` → as the page writes them"""
ZERO_SHOT, RIVAL = "sentence-transformers, as it comes", "sentence-transformers, fine-tuned"
