import logging
import multiprocessing
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from acebert.errors import UserError
from acebert.training.checkpoint import (
    HISTORY,
    MANIFEST,
    PROGRESS,
    STATE,
    Checkpoints,
    Progress,
    begun_otherwise,
    code_identity,
    load_progress,
    load_tensors,
    why_broken,
)
from acebert.training.finetune import best_whole

CPU = torch.device("cpu")
IDENTITY = {"key": {"train": {"lr": 0.001}, "plan": "ab12"}, "code": {"models/losses.py": "ff00"}}


def state(step: int, size: int = 1000) -> dict:
    """Tensors that tell their step, in a tree such as an optimiser's."""
    return {
        "model": {"weight": torch.full((size,), float(step)), "empty": torch.zeros(0)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "groups": [{"lr": 0.1}]},
    }


def progress(step: int, best_step: int = 0) -> Progress:
    made = Progress(step, seconds=step / 3, best=0.25, best_step=best_step, since_best=1)
    made.add_steps([{"step": i + 1, "loss": 1 / (i + 1)} for i in range(step)])
    made.validations.append({"step": 2, "recall_100": 0.1})
    return made


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step-" + "[0-9]" * 8))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", IDENTITY, keep=2)


def test_what_is_loaded_is_what_was_saved(checkpoints: Checkpoints):
    saved = progress(7)
    saved.add_steps([{"step": 8, "loss": 0.5, "domain_loss": 0.75}])  # not every step has it
    checkpoints.save(state(7), saved)
    checkpoints.wait()
    path = checkpoints.newest()
    assert path is not None
    loaded = load_tensors(path, CPU)
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 7.0))
    assert loaded["optimizer"]["state"][0]["step"] == 7
    assert loaded["optimizer"]["groups"] == [{"lr": 0.1}]
    again = load_progress(path)
    assert again == saved
    assert again.history["domain_loss"].to_pylist() == [None] * 7 + [0.75]


def test_a_step_that_follows_at_once_does_not_reach_the_checkpoint(checkpoints: Checkpoints):
    tensors, at = state(1, size=5_000_000), progress(1)
    for step in (1, 2, 3):
        tensors["model"]["weight"].fill_(step)
        at.step = step
        checkpoints.save(tensors, at)
        tensors["model"]["weight"].fill_(-1)
        at.validations.append({"step": -1})
        checkpoints.wait()
        path = checkpoints.at(step)
        assert torch.equal(
            load_tensors(path, CPU)["model"]["weight"].unique(), torch.tensor([step])
        )
        assert len(load_progress(path).validations) == step


def test_the_newest_are_kept_and_the_best_of_each(checkpoints: Checkpoints):
    for step in range(1, 9):
        checkpoints.save(state(step), progress(step, best_step=3 if step < 8 else 8))
    checkpoints.wait()
    assert steps(checkpoints.directory) == [3, 7, 8]  # 3 is the best of those that 7 knows
    checkpoints.save(state(9), progress(9, best_step=8))
    checkpoints.wait()
    assert steps(checkpoints.directory) == [8, 9]


def cut_short(path: Path) -> None:
    os.truncate(path / STATE, (path / STATE).stat().st_size // 2)


def one_bit(path: Path) -> None:
    data = bytearray((path / STATE).read_bytes())
    data[len(data) // 2] ^= 1
    (path / STATE).write_bytes(data)


def lose(name: str):
    return lambda path: (path / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, rf"{STATE} has \d+ bytes of \d+"),
        (one_bit, rf"{STATE} is not what was written"),
        (lose(HISTORY), rf"{HISTORY} is missing"),
        (lose(MANIFEST), rf"{MANIFEST} cannot be read"),
        (lambda path: (path / MANIFEST).write_text("{"), rf"{MANIFEST} cannot be read"),
        (lambda path: (path / PROGRESS).write_text("{}"), rf"{PROGRESS} has 2 bytes of"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before_it(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, damage, words: str
):
    for step in (1, 2):
        checkpoints.save(state(step), progress(step))
    checkpoints.wait()
    damage(checkpoints.at(2))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest() == checkpoints.at(1)
    (record,) = caplog.records
    assert str(checkpoints.at(2)) in record.message
    assert re.search(words, record.message)
    checkpoints.save(state(2), progress(2))  # and its place is taken again
    checkpoints.wait()
    assert checkpoints.newest() == checkpoints.at(2)


def test_a_torn_best_checkpoint_is_passed_over_for_the_best_of_those_that_are_left(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
):
    made = Progress()
    for step, recall in ((1, 0.3), (2, 0.5), (3, 0.4), (4, 0.35)):
        made.step, made.best_step = step, min(step, 2)
        made.validations.append({"step": step, "recall_100": recall, "gauc": 0.6})
        checkpoints.save(state(step), made)
    checkpoints.wait()
    assert steps(checkpoints.directory) == [2, 3, 4]

    def best() -> float:
        return best_whole(checkpoints, made, "recall_100")["step"]

    assert best() == 2
    assert not caplog.records
    one_bit(checkpoints.at(2))
    assert best() == 3
    (record,) = caplog.records
    assert f"{checkpoints.at(2)}, the best checkpoint, is passed over" in record.message
    one_bit(checkpoints.at(3))
    assert best() == 4
    one_bit(checkpoints.at(4))
    with pytest.raises(UserError, match=r"run: no checkpoint of a validation is whole"):
        best()


def test_without_any_whole_checkpoint_there_is_none(checkpoints: Checkpoints):
    assert checkpoints.newest() is None
    checkpoints.save(state(1), progress(1))
    checkpoints.wait()
    cut_short(checkpoints.at(1))
    assert checkpoints.newest() is None


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        (
            {"key": IDENTITY["key"], "code": {"models/losses.py": "ee11"}},
            r"code\.models/losses\.py was ff00, is ee11",
        ),
        (
            {"key": IDENTITY["key"], "code": {**IDENTITY["code"], "models/new.py": "11"}},
            r"code\.models/new\.py was not there, is 11",
        ),
    ],
)
def test_a_checkpoint_of_other_code_is_refused(
    checkpoints: Checkpoints, identity: dict, words: str
):
    checkpoints.save(state(1), progress(1))
    checkpoints.wait()
    with pytest.raises(UserError, match=rf"nothing had happened: {words}\. Go back"):
        Checkpoints(checkpoints.directory, identity, keep=2).newest()


def test_a_stopped_training_with_another_key_is_told_with_what_differs_and_one_that_runs_is_not(
    tmp_path: Path,
):
    train = tmp_path / "train"
    for name, lr in (("finetune-a", 0.001), ("finetune-b", 0.002), ("pretrain-c", 0.003)):
        made = Checkpoints(train / name / "checkpoints", {"key": {"train": {"lr": lr}}}, keep=1)
        made.save(state(3), progress(3))
        made.wait()
    ours = train / "finetune-b", "finetune", {"train": {"lr": 0.002}}
    (line,) = begun_otherwise(*ours)
    checkpoint = train / "finetune-a" / "checkpoints" / "step-00000003"
    assert line == f"{checkpoint}: train.lr was 0.001, is 0.002"
    with FileLock(tmp_path / "finetune" / ".a.lock"):  # as whoever builds the stage
        assert list(begun_otherwise(*ours)) == []


def test_the_code_that_trains_is_known_by_file():
    code = code_identity()
    assert {"torch", "acebert/training/loop.py", "acebert/models/losses.py"} <= code.keys()
    assert not any("serving" in name or "sweep" in name for name in code)


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_its_room_to_others(
    small_disk: Path,
) -> None:
    checkpoints = Checkpoints(small_disk / "run", IDENTITY, keep=2)
    for step in (1, 2):
        checkpoints.save(state(step, size=5_000_000), progress(step))  # 20 of the 32 MB
    with pytest.raises(UserError, match="the disk is full, a checkpoint takes 19 MiB"):
        checkpoints.wait()
    assert list(checkpoints.directory.iterdir()) == [checkpoints.at(1)]


class Unwanted:
    def __reduce__(self) -> tuple:
        return os.system, ("false",)


def test_a_checkpoint_from_elsewhere_cannot_run_code(checkpoints: Checkpoints):
    checkpoints.save(state(1), progress(1))
    checkpoints.wait()
    torch.save({"model": Unwanted()}, checkpoints.at(1) / STATE)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        load_tensors(checkpoints.at(1), CPU)


def _save_for_ever(directory: Path) -> None:
    checkpoints = Checkpoints(directory, IDENTITY, keep=2)
    for step in range(1, 10_000):
        checkpoints.save(state(step, size=300_000), progress(step))


def test_a_writer_killed_at_any_time_leaves_whole_checkpoints(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    for run in range(3):
        directory = tmp_path / str(run)
        writer = context.Process(target=_save_for_ever, args=(directory,))
        writer.start()
        while len(steps(directory)) < 2:
            time.sleep(0.001)
        writer.join(0.05 + 0.03 * run)
        writer.kill()
        writer.join()
        left = steps(directory)
        assert left
        assert all(why_broken(directory / f"step-{step:08d}") is None for step in left)
        newest = Checkpoints(directory, IDENTITY, keep=2).newest()
        assert newest is not None
        weight = load_tensors(newest, CPU)["model"]["weight"]
        assert weight.unique().tolist() == [left[-1]]
        assert {path.name[:5] for path in directory.iterdir()} == {"step-"}  # nothing lies about
