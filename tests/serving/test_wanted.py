"""Which bundle is served: by MLflow's registry, a real one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from acebert.config import Settings
from acebert.errors import UserError
from acebert.serving import wanted as module
from acebert.serving.wanted import WantedBundle
from acebert.tracking import client, log_model, start_run


def serves(world: Any, model: str) -> Settings:
    """The world with its bundles in a work directory of its own, and `serve.model`."""
    (world.settings.workdir / "bundle").symlink_to(world.bundle.parent)
    serve = world.settings.serve.model_copy(update={"model": model})
    return world.settings.model_copy(update={"serve": serve})


def register(settings: Settings, model: Path) -> None:
    with start_run(settings, "finetune", model.name) as run:
        log_model(settings, run, model)


def test_an_alias_that_moves_changes_what_is_served(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASK_SECONDS", 0)
    settings = serves(world, "models:/acebert@champion")
    for bundle in (world.bundle, world.other_bundle):
        register(settings, bundle / "model")
    registry = client(settings)
    wanted = WantedBundle(settings)
    for version, bundle in (("1", world.bundle), ("2", world.other_bundle), ("1", world.bundle)):
        registry.set_registered_model_alias("acebert", "champion", version)
        assert wanted() == world.settings.workdir / "bundle" / bundle.name


def test_a_model_that_is_registered_already_moves_the_alias_and_is_no_new_version(
    world: Any,
) -> None:
    settings = serves(world, "models:/acebert@candidate")
    being_built = world.settings.workdir / ".0123.partial"  # as a training registers its model
    shutil.copytree(world.bundle / "model", being_built)
    (being_built / "stage.json").unlink(missing_ok=True)
    for model in (being_built, world.other_bundle / "model", world.bundle / "model"):
        register(settings, model)
    registry = client(settings)
    assert len(registry.search_model_versions("name = 'acebert'")) == 2
    assert registry.get_model_version_by_alias("acebert", "candidate").version == 1


def test_where_the_alias_leads_nowhere_the_last_bundle_stands(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "ASK_SECONDS", 0)
    settings = serves(world, "models:/acebert@candidate")
    register(settings, world.bundle / "model")
    wanted = WantedBundle(settings)
    before = wanted()
    client(settings).delete_registered_model_alias("acebert", "candidate")
    assert wanted() == before
    assert "models:/acebert@candidate: no model that a training registered" in caplog.text
    with pytest.raises(UserError, match="no model that a training registered"):
        WantedBundle(settings)()


def test_of_a_models_bundles_the_one_made_last_is_served(world: Any, tmp_path: Path) -> None:
    serve = world.settings.serve.model_copy(update={"model": str(world.model)})
    settings = world.settings.model_copy(update={"serve": serve})
    info = json.loads((world.bundle / "bundle.json").read_text())
    other = json.loads((world.other_bundle / "bundle.json").read_text())
    for name, of, day in (
        ("b", info, "2026-02-02"),
        ("a", info, "2026-01-31"),
        ("c", info, "2026-01-01"),
        ("newest", other, "2026-03-01"),
    ):
        directory = tmp_path / "bundle" / name
        directory.mkdir(parents=True)
        made = {**of["made"], "bundle": f"{day}T00:00:00+00:00"}
        (directory / "bundle.json").write_text(json.dumps({**of, "made": made}))
    assert WantedBundle(settings)().name == "b"


def test_a_model_without_a_bundle_is_an_error_that_names_the_command(world: Any) -> None:
    serve = world.settings.serve.model_copy(update={"model": str(world.model)})
    settings = world.settings.model_copy(update={"serve": serve})
    with pytest.raises(UserError, match=r"no bundle of it.*publish.py --model .* makes one"):
        WantedBundle(settings)()
