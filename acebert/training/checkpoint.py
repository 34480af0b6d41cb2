"""Checkpoints of a training run: whole, exact, and written while training goes on.

    checkpoints = Checkpoints(directory, identity, keep=2)
    checkpoints.save(tensors, progress)      # returns when the tensors are copied
    newest = checkpoints.newest()            # the newest that is whole, or None

* `<directory>/step-00000120/` holds `state.pt` (weights and optimiser states), `progress.json`
  (counters and validations), `history.parquet` (a row a step) and `manifest.json`: size and SHA-256
  of the others, and what the run was made of. It is written aside, synced and renamed.
* Kept are the newest `keep` and, for each of these, the best of its time.
* What is a function of the step is not in it: the batch (plan, step), random numbers (seed, step,
  rank), the scheduler (step, seconds used), the adversary's phase (step modulo k).
* Ray Train's own manager is not used (docs/decisions.md, 'Checkpoints').
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from acebert.config import flatten
from acebert.errors import UserError
from acebert.workdir import is_being_built, is_disk_full, sync

log = logging.getLogger(__name__)

STATE, PROGRESS, HISTORY, MANIFEST = "state.pt", "progress.json", "history.parquet", "manifest.json"
CODE_THAT_TRAINS = (
    *("config.py", "data", "evaluation/gauc.py", "evaluation/recall.py", "models", "training"),
)
"""below acebert/: source that a step or a validation runs through"""


@dataclass
class Progress:
    """Where a run stands; with weights and optimiser states it is all that resuming needs.

    Attributes:
        step: steps done
        seconds: training time used, without validation and start-up [s]
        best: best value of the validation metric, -inf before the first
        best_step: the step after which it was measured, 0 before the first
        since_best: validations since then
        validations: one row a validation
        history: one row a step: `step` int64, metrics float64, null where a step has none
    """

    step: int = 0
    seconds: float = 0.0
    best: float = float("-inf")
    best_step: int = 0
    since_best: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    history: pa.Table = field(default_factory=lambda: pa.table({"step": pa.array([], pa.int64())}))

    def add_steps(self, rows: list[dict[str, float]]) -> None:
        """Append a row a step to the history."""
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        self.history = pa.concat_tables([self.history, table], promote_options="default")


def code_identity() -> dict[str, str]:
    """First 12 hex digits of the SHA-256 of each source file that trains, and the versions of the
    libraries that compute."""
    package = Path(__file__).parents[1]
    roots = [package / name for name in CODE_THAT_TRAINS]
    files = sorted(f for root in roots for f in ([root] if root.is_file() else root.rglob("*.py")))
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **{
            f"acebert/{f.relative_to(package)}": hashlib.sha256(f.read_bytes()).hexdigest()[:12]
            for f in files
        },
    }


class Checkpoints:
    """The checkpoints under one directory; one process writes, any reads.

    Args:
        directory: made when it is not there
        identity: what the run is made of (settings, digests of inputs, code), a JSON tree; a
            checkpoint of another is refused
        keep: newest checkpoints to keep beside the best
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.directory = directory
        self._identity = json.loads(json.dumps(identity, default=str))
        self._keep = keep
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        tensors: Mapping[str, Any],
        progress: Progress,
        *,
        then: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Copy `tensors` (a tree of dicts and lists) and `progress` to host memory and return; a
        thread writes them and calls `then(progress)` when the checkpoint is there for good.

        The host buffers are used again: it waits where the last checkpoint is still being written.

        Raises:
            UserError: the disk was full when the checkpoint before this one was written.
        """
        self.wait()
        host = _copy_to_host(tensors, self._buffers)
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied is not None:
            copied.record()
        frozen = replace(progress, validations=list(progress.validations))

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            self._write(host, frozen)
            then(frozen)

        self._writing = self._thread.submit(write)

    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Return when nothing is being written; raises what the writing raised (see `save`)."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, RuntimeError) as error:  # torch.save's errors carry no errno
            size = sum(buffer.nbytes for buffer in self._buffers.values())
            full = is_disk_full(error) or shutil.disk_usage(self.directory).free < size
            self._remove_halves()  # or there is no room to say it
            if full:
                raise UserError(
                    f"{self.directory}: the disk is full, a checkpoint takes {size / 2**20:.0f} "
                    "MiB. Free some space and start the job again: it goes on from the last one"
                ) from error
            raise

    def newest(self) -> Path | None:
        """The newest whole checkpoint, for the process that writes: newer ones that are broken are
        renamed to *.corrupt with a warning, and what a dead writer left is removed.

        Raises:
            UserError: it is of other code; the differences are named.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_halves()
        for path in reversed(self._paths()):
            broken = why_broken(path)
            if broken is None:
                self._refuse_other(path)
                return path
            log.warning("checkpoint %s is passed over for the one before it: %s", path, broken)
            os.replace(path, path.with_suffix(f".{uuid.uuid4().hex[:6]}.corrupt"))
        return None

    def at(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.directory / f"step-{step:08d}"

    def _remove_halves(self) -> None:
        """What a writer left that failed or died."""
        for half in self.directory.glob(".step-*"):
            shutil.rmtree(half, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if p.suffix != ".corrupt")

    def _refuse_other(self, path: Path) -> None:
        differences = _differences(_identity(path), self._identity)
        if differences:
            raise UserError(
                f"{path} was written by other code, so that training cannot go on "
                f"from it as if nothing had happened: {'; '.join(differences)}. Go back to those, "
                f"or remove {self.directory} to train from the start"
            )

    def _write(self, tensors: Mapping[str, Any], progress: Progress) -> None:
        final = self.at(progress.step)
        aside = self.directory / f".{final.name}.{uuid.uuid4().hex[:6]}"
        aside.mkdir(parents=True)
        # By its name, torch leaves the file open while its error is known, and the disk full.
        with (aside / STATE).open("wb") as file:
            torch.save(tensors, file)
        counters = {k: v for k, v in vars(progress).items() if k != "history"}
        (aside / PROGRESS).write_text(json.dumps(counters))
        pq.write_table(progress.history, aside / HISTORY)
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in aside.iterdir()}
        manifest = {"identity": self._identity, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*aside.iterdir(), aside]:
            sync(path)
        if final.exists():  # this step's, written by a process that lost it
            _discard(final)
        os.rename(aside, final)
        sync(self.directory)
        self._prune()

    def _prune(self) -> None:
        paths = self._paths()
        newest = paths[-self._keep :]
        kept = {*newest, *(self.at(_counters(path)["best_step"]) for path in newest)}
        for path in paths:
            if path not in kept:
                _discard(path)


def begun_otherwise(directory: Path, stage: str, key: Mapping[str, Any]) -> Iterator[str]:
    """A line for each training of this stage, beside the one in `directory`, that was stopped at a
    checkpoint: how far it came, and in what its key is another."""
    workdir = directory.parents[1]
    for checkpoints in sorted(directory.parent.glob(f"{stage}-*/checkpoints")):
        paths = sorted(path for path in checkpoints.glob("step-*") if path.suffix != ".corrupt")
        other = checkpoints.parent
        if other == directory or not paths:
            continue
        if is_being_built(workdir, stage, other.name.removeprefix(f"{stage}-")):
            continue
        try:
            differences = _differences(_identity(paths[-1])["key"], key)
        except (OSError, ValueError, KeyError):  # torn, or just being removed
            continue
        yield f"{paths[-1]}: {'; '.join(differences)}"


def _identity(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())["identity"]


def _differences(of_theirs: Mapping[str, Any], of_ours: Mapping[str, Any]) -> list[str]:
    """Leaves of two trees that differ: 'train.lr was 0.001, is 0.01'."""
    theirs, ours = flatten(dict(of_theirs)), flatten(json.loads(json.dumps(of_ours, default=str)))
    return [
        f"{name} was {theirs.get(name, 'not there')}, is {ours.get(name, 'not there')}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


def _discard(path: Path) -> None:
    """Remove a checkpoint at once: a process killed here leaves no half of it under its name."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:6]}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def load_tensors(path: Path, device: torch.device) -> dict[str, Any]:
    """The tree of tensors that `save` was given, on `device`; nothing is unpickled."""
    return torch.load(path / STATE, map_location=device, weights_only=True)


def load_progress(path: Path) -> Progress:
    return Progress(**_counters(path), history=pq.read_table(path / HISTORY))


def _counters(path: Path) -> dict[str, Any]:
    return json.loads((path / PROGRESS).read_text())


def why_broken(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None when they are as they were written."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
        if _sha256(file) != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _copy_to_host(
    tree: Any, buffers: dict[tuple[Any, ...], torch.Tensor], path: tuple[Any, ...] = ()
) -> Any:
    """`tree` with its tensors copied into `buffers`, which are made when they do not fit; from a
    GPU the copies are pinned and in flight."""
    if isinstance(tree, torch.Tensor):
        buffer = buffers.get(path)
        if buffer is None or buffer.shape != tree.shape or buffer.dtype != tree.dtype:
            buffer = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
            buffers[path] = buffer
        return buffer.copy_(tree.detach(), non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: _copy_to_host(value, buffers, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copy_to_host(value, buffers, (*path, i)) for i, value in enumerate(tree)]
    return tree


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
