"""Where the settings of a row are not the paper's, whose are those of the recipe at its size."""

from typing import Any

from acebert.config import HOW_IT_RUNS, Settings, flatten, load_settings
from acebert.tracking import without_password

PAPER = "acebert"
"""the recipe that is ACE-BERT as the paper has it"""
OF_A_MODEL: Any = {
    **dict.fromkeys(("model", "text", "image", "loss", "adversary", "plan", "train"), True),
    "data": {"hot_queries"},
}
NO_PART_OF_IT: Any = {
    "train": set(HOW_IT_RUNS),
    "image": {"feature_cache_dir"},
    "loss": {"hard_negatives_from"},
    "pretrain": {"seed"},
}
"""how a training runs, paths, and which of its seeds it is"""


def departures(settings: Settings) -> list[str]:
    """`leaf: ours (paper: theirs)` of every setting that makes a model and is not the paper's;
    those of pre-training too, where the row starts from it."""
    before = {"pretrain": True} if settings.model.start == "pretrain" else {}
    ours, paper = (
        flatten(one.model_dump(mode="json", include=OF_A_MODEL | before, exclude=NO_PART_OF_IT))
        for one in (settings, load_settings(["--recipe", PAPER]))
    )
    return [
        f"{leaf}: {_told(value)} (paper: {_told(paper[leaf])})"
        for leaf, value in ours.items()
        if value != paper[leaf]
    ]


def start_weights(settings: Settings) -> str:
    """What a row's encoder starts from, in words."""
    backbone = settings.model.backbone
    given = "random weights" if backbone is None else without_password(backbone)
    return f"its own pre-training from {given}" if settings.model.start == "pretrain" else given


def _told(value: object) -> str:
    """As on the command line."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else without_password(str(value))
