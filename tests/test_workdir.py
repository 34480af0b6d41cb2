import errno
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from acebert.errors import UserError
from acebert.workdir import digest_of, run_stage, stages_used


def test_same_key_is_built_once_and_another_key_apart(tmp_path: Path):
    built: list[int] = []

    def build(out: Path) -> None:
        built.append(1)
        (out / "x").write_text("x")

    first = run_stage(tmp_path, "s", {"a": 1}, build)
    again = run_stage(tmp_path, "s", {"a": 1}, build)
    other = run_stage(tmp_path, "s", {"a": 2}, build)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert first.path == again.path != other.path
    assert len(built) == 2
    assert again.seconds == pytest.approx(first.seconds, abs=1e-3)


def test_stages_used_are_those_asked_for_in_the_block_built_or_reused(tmp_path: Path):
    def outer(out: Path) -> None:
        run_stage(tmp_path, "inner", {}, lambda _: None)

    before = run_stage(tmp_path, "before", {}, lambda _: None)
    with stages_used() as all_used:
        built = run_stage(tmp_path, "outer", {}, outer)
        with stages_used() as used:
            run_stage(tmp_path, "before", {}, lambda _: None)
    run_stage(tmp_path, "after", {}, lambda _: None)
    assert list(used) == [before.path]
    assert {path.parent.name for path in all_used} == {"outer", "inner", "before"}
    assert all_used[built.path].seconds == built.seconds


def test_reuse_is_said_once_and_not_of_what_was_just_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    for key in ({}, {}, {"a": 1}):
        run_stage(tmp_path, "s", key, lambda _: None)
    assert "reused" not in caplog.text
    program = (
        "import logging, sys; from pathlib import Path; from acebert.workdir import run_stage\n"
        "logging.basicConfig(level='INFO')\n"
        "for _ in range(3): run_stage(Path(sys.argv[1]), 's', {}, lambda _: None)"
    )
    later = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert later.stderr.count("s: reused") == 1


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})


def test_a_build_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path):
    def build(out: Path) -> None:
        (out / "half").write_text("x")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        run_stage(tmp_path, "s", {}, build)
    assert not list(tmp_path.rglob("half"))
    assert run_stage(tmp_path, "s", {}, lambda out: None).reused is False


def test_what_a_killed_process_left_is_built_anew(tmp_path: Path):
    script = textwrap.dedent(
        f"""
        import os, pathlib, signal
        from acebert.workdir import run_stage
        def build(out):
            (out / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        run_stage(pathlib.Path({str(tmp_path)!r}), "s", {{}}, build)
        """
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    stage = run_stage(tmp_path, "s", {}, lambda out: (out / "whole").write_text("x") and None)
    assert sorted(p.name for p in stage.path.iterdir()) == ["stage.json", "whole"]


def _slow_stage(tmp_path: Path) -> bool:
    return run_stage(tmp_path, "s", {}, lambda out: time.sleep(1)).reused


def test_two_processes_that_want_one_stage_build_it_once(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert sorted(pool.map(_slow_stage, [tmp_path, tmp_path])) == [False, True]


def test_a_full_disk_is_said_plainly(tmp_path: Path):
    def build(out: Path) -> None:
        with open("/dev/full", "w") as full:  # every write to it fails with ENOSPC
            full.write("x" * 10_000)

    with pytest.raises(UserError, match=r"disk under .* is full.*--workdir"):
        run_stage(tmp_path, "s", {}, build)


def test_a_quota_that_is_used_up_is_said_as_a_full_disk_also_where_it_comes_as_text(tmp_path: Path):
    for error in (OSError(errno.EDQUOT, "x"), RuntimeError(f"write: {os.strerror(errno.EDQUOT)}")):

        def build(out: Path, error: Exception = error) -> None:
            raise error

        with pytest.raises(UserError, match=r"disk under .* is full, or your quota of it"):
            run_stage(tmp_path, "s", {}, build)


def test_a_workdir_that_is_a_file_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_stage(file, "s", {}, lambda out: None)
