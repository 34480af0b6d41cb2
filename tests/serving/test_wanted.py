"""Which bundle is served: by MLflow's registry, a real one."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray.serve.scripts import cli

from acebert.config import Settings
from acebert.errors import UserError
from acebert.serving import wanted as module
from acebert.serving.wanted import WantedBundle
from acebert.tracking import client, log_model, model_directory, start_run
from acebert.workdir import file_digests


@pytest.fixture(autouse=True)
def own_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a service sets in its environment does not outlive the test."""
    for name in module.IMPATIENT:
        monkeypatch.setenv(name, "")
        del os.environ[name]


class Silent:
    """A server that takes connections and says nothing; `hang_up` ends them."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []
        self._hung_up = False
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                taken, _ = self._socket.accept()
            except OSError:
                return
            self.taken.append(taken)
            if self._hung_up:
                taken.close()

    def hang_up(self) -> None:
        self._hung_up = True
        for taken in self.taken:
            taken.close()

    def close(self) -> None:
        self.hang_up()
        self._socket.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Silent()
    yield server
    server.close()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come true in time")


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
        expected = world.settings.workdir / "bundle" / bundle.name
        until(lambda expected=expected: wanted() == expected)  # type: ignore[misc]
        assert wanted() == expected


def test_the_work_directory_keeps_a_registered_model_as_old_as_its_version(world: Any) -> None:
    settings = serves(world, "models:/acebert@candidate")
    register(settings, world.bundle / "model")
    version = client(settings).get_model_version("acebert", "1")
    first, second = (
        model_directory(settings, address)
        for address in ("models:/acebert@candidate", "models:/acebert/1")
    )
    assert first == second
    assert first.is_relative_to(settings.workdir / "registered")
    assert file_digests(first) == file_digests(world.bundle / "model")
    weights = (first / "model.safetensors").stat()
    assert weights.st_mtime == pytest.approx(version.creation_timestamp / 1000)
    with pytest.raises(UserError, match=r"--model models:/acebert/7: not in sqlite"):
        model_directory(settings, "models:/acebert/7")


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
    told = "models:/acebert@candidate: no model that a training registered"
    until(lambda: wanted() == before and told in caplog.text)
    assert wanted() == before
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


def test_while_mlflow_is_silent_the_last_answer_is_given_and_one_question_is_asked(
    world: Any, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = serves(world, "models:/acebert@candidate")
    register(settings, world.bundle / "model")
    wanted = WantedBundle(settings)
    before = wanted()
    monkeypatch.setattr(module, "ASK_SECONDS", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
    for _ in range(20):
        assert wanted() == before
    until(lambda: len(silent.taken) > 0)
    for _ in range(20):
        assert wanted() == before
    assert len(silent.taken) == 1
    silent.hang_up()
    until(lambda: wanted() == before and len(silent.taken) > 1)  # asked again


def test_where_no_answer_was_ever_given_those_who_ask_meanwhile_are_refused_without_asking(
    world: Any, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent.uri)
    silent.hang_up()
    wanted = WantedBundle(serves(world, "models:/acebert@candidate"))
    with pytest.raises(UserError, match="does not answer"):
        wanted()
    asked = len(silent.taken)
    assert asked > 0
    with pytest.raises(UserError, match="does not answer"):
        wanted()
    assert len(silent.taken) == asked


def test_a_service_waits_seconds_for_mlflow_unless_its_environment_says_otherwise(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    with pytest.raises(UserError):
        WantedBundle(serves(world, "models:/acebert@candidate"))()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("serve.k=3", "unrecognized arguments: --serve.k=3"), ("seed=1", "nothing to serve there")],
)
def test_serve_run_tells_what_is_wrong_in_a_line(
    tmp_path: Path, argument: str, reason: str
) -> None:
    ran = CliRunner().invoke(cli, ["run", "serve.app:app", f"workdir={tmp_path}", argument])
    assert ran.exit_code == 1
    (line,) = (line for line in ran.output.splitlines() if line.startswith("Error: "))
    assert reason in line
    assert "Traceback" not in ran.output
