"""Settings of the jobs that use a trained model: its own, but for those that are no model's."""

from collections.abc import Collection, Sequence
from pathlib import Path

from acebert.config import (
    HOW_IT_RUNS,
    Settings,
    flatten,
    load_settings,
    read_recipe,
    settings_from,
    weights_digest,
)
from acebert.errors import UserError

NOT_THE_MODELS = ("workdir", "data", "eval", "serve", "experiment", "tracking")
"""settings that do not come with a trained model"""
OF_THE_NODES = {
    "image": ("feature_cache", "feature_cache_dir"),
    "train": tuple(sorted(HOW_IT_RUNS)),
}
"""leaves of its sections that do not either: where a node reads features changes none, and the
nodes of its training may not be there"""


def model_settings(settings: Settings, model: Path) -> Settings:
    """The settings that a model was trained with, but for NOT_THE_MODELS and OF_THE_NODES, which
    are those of `settings`."""
    own = settings_from(read_recipe(str(_settings_file(model))))
    ours = {name: getattr(settings, name) for name in NOT_THE_MODELS}
    for name, leaves in OF_THE_NODES.items():
        of_nodes = {leaf: getattr(getattr(settings, name), leaf) for leaf in leaves}
        ours[name] = getattr(own, name).model_copy(update=of_nodes)
    return own.model_copy(update=ours)


def settings_for(model: Path, argv: Sequence[str], also: Collection[str] = ()) -> Settings:
    """For the jobs that use a trained model: its own settings, with those of NOT_THE_MODELS, of
    OF_THE_NODES and of `also` (sections and leaves) that `argv` gives. HOW_IT_RUNS are `argv`'s or
    the defaults: no job waits for the nodes of a training that is over.

    Raises:
        UserError: `argv` gives one that belongs to the model.
    """
    tree = read_recipe(str(_settings_file(model)))
    train = tree.get("train", {})
    tree["train"] = {leaf: train[leaf] for leaf in train if leaf not in HOW_IT_RUNS}
    own, given = settings_from(tree), load_settings(argv, tree=tree)
    kept = own.image.cnn_weights
    if weights_digest(given.image.cnn_weights) == Path(kept).stem:  # what it is a copy of
        image = given.image.model_copy(update={"cnn_weights": kept})
        given = given.model_copy(update={"image": image})
    was, now = flatten(own.model_dump()), flatten(given.model_dump())
    of_nodes = (f"{name}.{leaf}" for name in OF_THE_NODES for leaf in OF_THE_NODES[name])
    free = (*NOT_THE_MODELS, *of_nodes, *also)
    for leaf in now:
        if now[leaf] != was.get(leaf) and not {leaf, leaf.split(".")[0]}.intersection(free):
            raise UserError(
                f"--{leaf}: {model} was trained with {was.get(leaf)}, and is used as it was "
                f"trained. What can be set: {', '.join(free)}"
            )
    return given


def _settings_file(model: Path) -> Path:
    if not (model / "settings.yaml").is_file():
        raise UserError(f"--model {model}: no model directory (it has no settings.yaml)")
    return model / "settings.yaml"


def without_the_models(argv: Sequence[str]) -> Settings:
    """Of a command line, the work directory and MLflow: what finds a registered model, whose
    settings the others are to be added to."""
    ours: list[str] = []
    taken = False
    for word in argv:
        if word.startswith("--"):
            leaf = word.removeprefix("--").partition("=")[0]
            taken = leaf == "workdir" or leaf.startswith("tracking.")
        if taken:
            ours.append(word)
    return load_settings(ours)
