"""The space file of a sweep: which settings are varied, how they are searched, what is best.

    vary:
      plan.batches_per_partition: [1, 10, 100]         # a list: these values
      loss.gamma: {low: 5, high: 80, log: true}        # or a range, for random and optuna
    search: grid                                       # grid | random | optuna
    seeds: [0, 1, 2]

A point gives each varied setting a value; a trial is a point and a seed. Everything that can be
wrong is found before anything runs.
"""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import numpy as np
import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from acebert.config import HOW_IT_RUNS, Section, Settings, settings_from
from acebert.errors import UserError
from acebert.workdir import digest_of

Point = dict[str, Any]
"""leaf of the settings tree → value"""

SHARED = ("image", "cnn", "text", "pretrain")
"""sections whose stages are made before the first trial"""
SPACES = Path(__file__).parents[2] / "tune_spaces"
"""what a space file that is not there is told of"""
VARIABLE = (*SHARED, "model", "plan", "loss", "adversary", "train")
"""sections that may be varied: those that make another model out of the same data"""


class Range(Section):
    """Values from low to high, both included; whole numbers where the setting is one."""

    low: float
    high: float
    log: bool = False
    """evenly in the logarithm"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, got {self.low:g}")
        return self


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020) on the validations of running trials."""

    first_rung: int = Field(ge=1)
    """encoder steps before a trial may be stopped"""
    reduction: int = Field(3, ge=2)
    """of so many trials at a rung one goes on; the next rung is so many times as far"""


Values = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "list" if isinstance(given, list) else "range"),
]


class Space(Section):
    """A space file."""

    vary: dict[str, Values]
    """leaf of the settings tree → its values"""
    search: Literal["grid", "random", "optuna"] = "grid"
    """every combination of the lists; points drawn at random; Optuna's TPE sampler"""
    points: int | None = Field(None, ge=1)
    """how many, for random and optuna"""
    seeds: tuple[int, ...] = (0,)
    """each point is trained once with each"""
    metric: Literal["recall_100", "gauc"] = "recall_100"
    """of the validation day: what the best point is best by"""
    asha: Asha | None = None
    """stop trials early that are behind"""
    trials_at_once: int | None = Field(None, ge=1)
    """trials that train at the same time (none: on GPUs as many as find their workers' GPUs, on
    CPUs one, or as many as `train.cpus_per_worker` has room for)"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.vary:
            raise ValueError("vary: names no setting")
        for leaf, values in self.vary.items():
            if values == []:
                raise ValueError(f"vary.{leaf}: an empty list; name at least one value")
            if isinstance(values, Range) and self.search == "grid":
                raise ValueError(f"vary.{leaf}: a range, but search: grid takes lists of values")
        if (self.points is None) != (self.search == "grid"):
            raise ValueError(
                "points: search: grid takes every combination, so leave it out"
                if self.search == "grid"
                else f"points: search: {self.search} needs to know how many"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: must be at least one, each once")
        if self.asha and len(self.seeds) > 1:
            raise ValueError(
                "asha: a point is judged by its mean over the seeds, which a stopped trial has "
                "not; take one seed, or leave asha out"
            )
        return self


@dataclass(frozen=True)
class Trial:
    """One training: a point and a seed."""

    point: Point
    seed: int

    @property
    def name(self) -> str:
        """For people and MLflow: `gamma=20 k=5 seed=0`."""
        return " ".join([*point_words(self.point), f"seed={self.seed}"])

    @property
    def digest(self) -> str:
        return digest_of({"point": self.point, "seed": self.seed})

    def settings(self, base: Settings) -> Settings:
        """`base` with the point's values and the seed; its MLflow run is called like the trial.

        Where W is varied, a validation comes after as many pairs, or train.patience would stop
        large batches later than small ones.
        """
        leaves = {**self.point, "seed": self.seed, "tracking.run_name": self.name}
        batch = self.point.get("train.batch_size")
        if batch and "train.validate_every" not in self.point:
            steps = base.train.validate_every * base.train.batch_size / batch
            leaves["train.validate_every"] = max(1, round(steps))
        return with_leaves(base, leaves)


def point_words(point: Point) -> list[str]:
    """`leaf=value`, with the leaf's section where two leaves are called alike."""
    names = [leaf.split(".")[-1] for leaf in point]
    return [
        f"{name if names.count(name) == 1 else leaf}={_exact(value)}"
        for name, (leaf, value) in zip(names, point.items(), strict=True)
    ]


def _exact(value: object) -> str:
    """Short, and still another word for another value."""
    return (
        short(value) if not isinstance(value, float) or float(short(value)) == value else str(value)
    )


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_space(path: Path) -> Space:
    """The space in a YAML file.

    Raises:
        UserError: no such file, no YAML mapping, an unknown or missing key, or keys that
            contradict each other; it names the file and the key.
    """
    if not path.is_file():
        known = ", ".join(str(p) for p in sorted(SPACES.glob("*.yaml")))
        raise UserError(f"--space {path}: no such file" + (f". There are {known}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a space is a mapping with the key vary (see tune_spaces/)")
    try:
        return Space(**tree)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in _complaints(error))) from error


def check_space(space: Space, base: Settings) -> None:
    """Every leaf exists, may be varied, does something, and takes every value (of a range: both
    ends).

    Raises:
        UserError: it names the leaf and the value.
    """
    if "train.valid_metric" not in space.vary and base.train.valid_metric != space.metric:
        raise UserError(
            f"metric: {space.metric}, but a trial keeps the checkpoint that is best by "
            f"--train.valid_metric {base.train.valid_metric}: give both the same"
        )
    for leaf, values in space.vary.items():
        field = _leaf_type(leaf)
        if isinstance(values, Range) and not {int, float} & field:
            raise UserError(f"vary.{leaf}: a range, but this setting is no number; give a list")
    corners = []
    for leaves in _corners(space):
        try:
            corners.append(with_leaves(base, leaves))
        except UserError as error:
            point = " ".join(f"{leaf}={value}" for leaf, value in leaves.items())
            raise UserError(f"vary {point}: {error}") from error
    pretrains = any(settings.model.start == "pretrain" for settings in corners)
    for leaf, values in space.vary.items():
        if space.search == "optuna" and isinstance(values, Range):
            section = leaf.split(".")[0]
            if section in SHARED or (section == "model" and pretrains):
                stages = "pretrain" if section == "model" else section
                raise UserError(
                    f"vary.{leaf}: Optuna would ask for new {stages} stages between trials; use "
                    "search: random, or a list of values"
                )
        reasons = [why_inert(leaf, settings) for settings in corners]
        if all(reasons):
            raise UserError(f"vary.{leaf}: all its values train the same: {reasons[0]}")


def why_inert(leaf: str, settings: Settings) -> str | None:
    """Why a setting changes nothing beside these others."""
    section, name = leaf.split(".")
    model, loss = settings.model, settings.loss
    if section == "adversary" and name != "form" and settings.adversary.form == "off":
        return "adversary.form is off"
    if section == "image" and not settings.reads_images:
        return "neither model.patches nor model.pixels"
    if section == "cnn" and not settings.trains_cnn:
        return "no CNN is trained (image.cnn_weights trained, with model.patches)"
    if section == "pretrain" and model.start != "pretrain":
        return f"model.start is {model.start}"
    if leaf == "model.image_attention_bias" and model.start == "pretrain":
        return "with model.start pretrain it is 0"
    if leaf == "plan.batches_per_partition" and settings.plan.partitions is not None:
        return f"plan.partitions is {settings.plan.partitions}"
    if leaf in ("model.width", "model.heads", "text.vocab_size") and model.backbone is not None:
        return f"model.backbone {model.backbone} brings its own"
    if name in ("hard_negative_ranks", "hard_negatives_from") and not loss.hard_negatives:
        return "loss.hard_negatives is 0"
    return None


def trials_of(space: Space, base: Settings) -> list[Trial]:
    """All trials of a grid or of a random search (drawn by `base.seed`), point by point."""
    if space.search == "grid":
        points = _corners(space)
    else:
        rng = np.random.RandomState(base.seed)  # what Tune's domains take
        domains = tune_domains(space)
        points = [
            drawn(space, {leaf: of.sample(random_state=rng) for leaf, of in domains.items()})
            for _ in range(space.points or 0)
        ]
    return [Trial(point, seed) for point in points for seed in space.seeds]


def corner_trials(space: Space) -> list[Trial]:
    """Trials at the bounds of the search."""
    return [Trial(point, space.seeds[0]) for point in _corners(space)]


def _corners(space: Space) -> list[Point]:
    """Every combination of a grid. Of a search, whose lists may have too many of them, every
    combination of the ranges' ends, with one list's values after the other, the other lists at
    their first."""
    ends = {leaf: _ends(values) for leaf, values in space.vary.items()}
    if space.search == "grid":
        return _product(ends)
    lists = [leaf for leaf, values in space.vary.items() if isinstance(values, list)]
    points = _product({leaf: of[:1] if leaf in lists else of for leaf, of in ends.items()})
    return points + [p | {leaf: v} for p in points for leaf in lists for v in ends[leaf][1:]]


def _product(values: Mapping[str, list[Any]]) -> list[Point]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def tune_domains(space: Space) -> dict[str, Any]:
    """Ray Tune's search domain of each leaf."""
    from ray import tune

    domains: dict[str, Any] = {}
    for leaf, values in space.vary.items():
        if not isinstance(values, Range):
            domains[leaf] = tune.choice(values)
        elif float not in _leaf_type(leaf):
            draw = tune.lograndint if values.log else tune.randint  # their upper end is excluded
            domains[leaf] = draw(int(values.low), int(values.high) + 1)
        else:
            draw = tune.loguniform if values.log else tune.uniform
            domains[leaf] = draw(values.low, values.high)
    return domains


def with_leaves(base: Settings, leaves: Mapping[str, Any]) -> Settings:
    """`base` with other values at some leaves.

    Raises:
        UserError: a value that its setting does not take, or that contradicts another.
    """
    tree = base.model_dump()
    for leaf, value in leaves.items():
        *sections, name = leaf.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return settings_from(tree)


def _complaints(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if part not in ("list", "range"))
        if item["type"] == "extra_forbidden":
            yield f"{key}: there is no such key; a space has {', '.join(Space.model_fields)}"
        elif item["type"] == "value_error":
            yield f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
        elif item["type"] == "tuple_type":
            yield f"{key}: takes a list, e.g. [0, 1, 2], got {item['input']!r}"
        elif item["type"] == "model_type":
            yield f"{key}: takes a list of values or {{low: …, high: …}}, got {item['input']!r}"
        else:
            yield f"{key}: {item['msg']}, got {item['input']!r}"


def _leaf_type(leaf: str) -> set[Any]:
    """The types that a leaf takes, e.g. {int, NoneType}."""
    section, _, name = leaf.partition(".")
    if section not in Settings.model_fields:
        raise UserError(
            f"vary.{leaf}: there is no such setting{_like(leaf)}; docs/settings.md lists them all"
        )
    if section == "seed":
        raise UserError("vary.seed: list the seeds under seeds:")
    if section not in VARIABLE:
        raise UserError(f"vary.{leaf}: can be varied: settings of {', '.join(VARIABLE)}")
    kind = Settings.model_fields[section].annotation
    if section == "train" and name in HOW_IT_RUNS:
        raise UserError(f"vary.{leaf}: it says how a training runs, not what comes out of it")
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    if name not in kind.model_fields:
        known = ", ".join(f"{section}.{field}" for field in kind.model_fields)
        raise UserError(
            f"vary.{leaf}: there is no such setting{_like(leaf)}. {section} has {known}"
        )
    annotation = kind.model_fields[name].annotation
    union = get_origin(annotation) in (Union, UnionType)
    return set(get_args(annotation)) if union else {annotation}


def _like(leaf: str) -> str:
    """The setting that may have been meant: called alike, or this leaf without its section."""
    known = [
        f"{section}.{name}"
        for section in VARIABLE
        if isinstance(kind := Settings.model_fields[section].annotation, type)
        for name in kind.model_fields
    ]
    meant = [name for name in known if name.split(".")[1] == leaf]
    meant += difflib.get_close_matches(leaf, known, n=1)
    return f" ({meant[0]}?)" if meant else ""


def _ends(values: list[Any] | Range) -> list[Any]:
    if isinstance(values, list):
        return values
    return [int(v) if v == int(v) else v for v in (values.low, values.high)]


def drawn(space: Space, point: Point) -> Point:
    """A point that a search drew: four digits of what comes from a range, or one of its ends, in
    Python's own numbers, which YAML and JSON know."""

    def plain(leaf: str, value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        values = space.vary[leaf]
        if isinstance(values, Range) and isinstance(value, float):
            return min(max(float(short(value)), values.low), values.high)
        return value

    return {leaf: plain(leaf, value) for leaf, value in point.items()}
