"""A model that has learned nothing, whose vectors can be told apart all the same."""

import shutil
from pathlib import Path

import torch
import yaml

from acebert.config import Settings
from acebert.models.dual import DualEncoder
from acebert.training.finetune import new_model
from acebert.training.pairs import StagePaths


def untrained(settings: Settings, paths: StagePaths, directory: Path, seed: int) -> Path:
    """A model directory of random weights, as the finetune stage writes it."""
    model = new_model(settings, paths)
    return save_untrained(model, settings, paths.tokens / "tokenizer", directory, seed)


def save_untrained(
    model: DualEncoder, settings: Settings, tokenizer: Path, directory: Path, seed: int
) -> Path:
    torch.manual_seed(seed)
    for parameter in model.parameters():  # those that it starts from give vectors too close
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save(directory)
    shutil.copytree(tokenizer, directory / "tokenizer")
    tree = settings.model_dump(mode="json", exclude={"tracking"})
    (directory / "settings.yaml").write_text(yaml.safe_dump(tree))
    return directory
