"""What the scripts under ray_jobs/ share: settings, log lines a person can read, errors.

A script is `run_job(work, __doc__)`. It runs with plain `python`, where it starts Ray itself, and
by `ray job submit`, where it joins the cluster. `work` imports the stages that it calls itself, so
that a wrong setting is told before Ray, torch and MLflow are loaded, which takes ten seconds.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from acebert.config import Settings, absolute, load_settings, print_help
from acebert.data.inputs import as_first_seen
from acebert.errors import UserError


def run_job(
    work: Callable[[Settings], None] | Callable[[argparse.Namespace], None],
    description: str | None,
    extra: argparse.ArgumentParser | None = None,
    argv: list[str] | None = None,
) -> NoReturn:
    """Parse the command line, and run `work(settings)` or, with `extra`, `work(arguments)`.

    `extra` is a parser for arguments that are no settings, made with add_help=False and
    allow_abbrev=False (`--seed` is not `--seeds`); the words that it leaves over are in
    `arguments.settings`, for `work` to read as its job does: by themselves, or on top of a model's
    own. Its inputs stay what it first sees them as (`acebert.data.inputs`). Exits with 0, with 2
    and the message alone after a `UserError`, with 130 after Ctrl-C.
    """
    set_up_logging()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "-h" in argv or "--help" in argv:
            print_help(description, extra)
        elif extra is None:
            with as_first_seen():
                work(load_settings(argv))  # type: ignore[arg-type]
        else:
            arguments, rest = extra.parse_known_args(argv)
            arguments.settings = rest
            with as_first_seen():
                work(arguments)  # type: ignore[arg-type]
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("stopped; give the same command again, what is done is reused", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


def model_arguments() -> argparse.ArgumentParser:
    """Of the jobs that use a trained model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", type=path, required=True, help="directory that finetune printed")
    return parser


def bundle_arguments(action: Literal["store", "append"] = "store") -> argparse.ArgumentParser:
    """Of the jobs that make a bundle for the service, or with `append` several, and publish it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--model",
        action=action,
        type=lambda text: text if text.startswith("models:/") else path(text),
        required=True,
        help="directory that finetune printed, or models:/",
    )
    parser.add_argument(
        "--query_encoder", action=action, type=path, help="directory that distill printed"
    )
    parser.add_argument("--arm", action=action, help="of an experiment (docs/experiments.md)")
    return parser


def refuse_given(argv: Sequence[str], leaves: Collection[str], why: str) -> None:
    """
    Raises:
        UserError: `argv` gives one of the settings `leaves` (`model.layers`).
    """
    for word in argv:
        if (leaf := word.removeprefix("--").partition("=")[0]) in leaves and word.startswith("--"):
            raise UserError(f"--{leaf}: {why}")


def path(text: str) -> Path:
    """An absolute path, the type of an argument: the cluster's workers are in other directories.

    Raises:
        ArgumentTypeError: an empty one, as of a variable that was not set; or a relative one, in a
            submitted job.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    try:
        return absolute(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def set_up_logging() -> None:
    """Our own lines at INFO with the time of day, other libraries' from WARNING on."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    logging.getLogger("acebert").setLevel(logging.INFO)
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
