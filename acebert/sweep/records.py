"""What became of each trial, on disk as soon as it is known: a sweep that is killed goes on here.

A record is a small JSON file of its own, so that nothing depends on Ray Tune's pickled state: it is
read by whatever version comes next, and by people.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from acebert.sweep.space import Trial
from acebert.sweep.trials import Outcome


class Records:
    """The outcomes of one sweep's trials."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        trees = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
        self._files = {Trial(**tree["trial"]).digest: tree["number"] for tree in trees}
        self.all = {
            (trial := Trial(**tree["trial"])).digest: Outcome(
                trial, tree["status"], tree["result"], tree["seconds"], tree["reason"]
            )
            for tree in trees
        }
        """by the trial's digest, in the order in which trials were first started"""

    def put(self, outcome: Outcome) -> None:
        digest = outcome.trial.digest
        number = self._files.setdefault(digest, len(self._files))
        self.all[digest] = outcome
        path = self.directory / f"{number:04d}.json"
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps({"number": number, **asdict(outcome)}, indent=2) + "\n")
        os.replace(aside, path)

    def ended(self) -> list[Outcome]:
        return [outcome for outcome in self.all.values() if outcome.status != "running"]
