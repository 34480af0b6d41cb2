"""The job as its user runs it: submitted to a real cluster, with token authentication."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from acebert.models.dual import DualEncoder
from acebert.models.encoder import TextInputs

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
SMALL = [
    *["--demo.products", "150", "--demo.searches_per_day", "300", "--demo.days", "4"],
    *["--demo.image_side", "64", "--train.max_steps", "4", "--train.batch_size", "32"],
    *["--model.width", "32", "--model.heads", "2", "--model.layers", "1"],
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def short_path() -> Iterator[Path]:
    """For Ray's unix sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, short_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a head that runs as the README says."""
    home = tmp_path_factory.mktemp("head")
    token = home / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    dashboard = free_port()
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(short_path),
    }
    env.pop("RAY_ADDRESS", None)
    command = [
        *[str(RAY), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"],
        *[f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"],
        "--object-store-memory=200000000",
    ]
    with open(home / "head.log", "w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(60):
            listed = subprocess.run(
                [str(RAY), "list", "nodes", "--format=json"],
                env=env,
                capture_output=True,
                text=True,
            )
            if listed.returncode == 0 and '"ALIVE"' in listed.stdout:
                break
            time.sleep(1)
        else:
            pytest.fail((home / "head.log").read_text())
        yield env
    finally:
        processes = psutil.Process(head.pid).children(recursive=True)  # asked to end, it takes 30 s
        for process in [head, *processes]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)
        head.wait()


def submit(env: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--working-dir", str(ROOT), "--", sys.executable, *argv]
    for _ in range(30):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        if "No available agent" not in done.stderr:  # the head's job agent is still starting
            break
        time.sleep(2)
    return done


@pytest.fixture(scope="module")
def submitted(
    cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A work directory and the job that was submitted to train in it."""
    workdir = tmp_path_factory.mktemp("submitted")
    return workdir, submit(cluster, "ray_jobs/finetune.py", "--workdir", str(workdir), *SMALL)


@pytest.fixture(scope="module")
def model(cluster: dict[str, str], submitted: Any) -> str:
    """The last line of the job's log."""
    _, done = submitted
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (submission,) = set(re.findall(r"raysubmit_\w+", done.stdout))
    logs = subprocess.run(
        [str(RAY), "job", "logs", submission], env=cluster, capture_output=True, text=True
    )
    return logs.stdout.rstrip().splitlines()[-1]


@pytest.mark.slow
def test_a_submitted_job_trains_and_the_next_submission_and_plain_python_reuse_its_model(
    cluster: dict[str, str], submitted: Any, model: str
):
    workdir, _ = submitted
    assert model.startswith(f"{workdir}/finetune")
    assert json.loads((Path(model) / "report.json").read_text())["steps"] == 4

    copied = submit(cluster, "ray_jobs/finetune.py", "--workdir", str(workdir), *SMALL)
    assert f"finetune: reused {model}" in copied.stdout
    again = subprocess.run(
        [sys.executable, "ray_jobs/finetune.py", "--workdir", str(workdir), *SMALL],
        **{"cwd": ROOT, "env": cluster, "capture_output": True, "text": True, "timeout": 400},
    )
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert again.stdout.splitlines()[-1] == model
    assert f"finetune: reused {model}" in again.stdout


@pytest.mark.slow
def test_embed_writes_vectors_that_others_can_score_with(
    cluster: dict[str, str], submitted: Any, model: str, tmp_path: Path
):
    workdir, _ = submitted
    queries = ["Red  Dress", "watch", "striped shirt", "watch"]
    pq.write_table(pa.table({"query": queries}), tmp_path / "q.parquet")
    out = tmp_path / "out"
    command = [sys.executable, "ray_jobs/embed.py", "--workdir", workdir, "--model", model]
    done = subprocess.run(
        [*map(str, command), "--queries", str(tmp_path / "q.parquet"), "--out", str(out)],
        **{"cwd": ROOT, "env": cluster, "capture_output": True, "text": True, "timeout": 400},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    products, embedded = (pq.read_table(out / f"{n}.parquet") for n in ("products", "queries"))
    assert embedded["query"].to_pylist() == queries[:3]  # each once, as it was given
    demo = pq.read_table(next(workdir.glob("demo/*/products.parquet")), columns=["product_id"])
    assert products["product_id"].to_pylist() == demo["product_id"].to_pylist()
    vectors = np.array(products["embedding"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    # The same by hand: one query through the model, without Ray, padding or bf16.
    tokenizer = AutoTokenizer.from_pretrained(f"{model}/tokenizer")
    pieces = tokenizer("red dress", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.cls_token_id, *pieces, tokenizer.sep_token_id]])
    text = TextInputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids))
    with torch.inference_mode():
        v = DualEncoder.load(Path(model)).eval().encode_queries(text)[0]
    assert float(v @ torch.tensor(embedded["embedding"][0].as_py())) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--train.lrr", "1"], "--train.lrr"), (["--workdir", "w"], "--workdir: w is relative")],
)
def test_a_wrong_setting_ends_a_job_at_once_with_its_name(
    cluster: dict[str, str], argv: list[str], message: str
):
    done = submit(cluster, "ray_jobs/finetune.py", *argv)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_client_without_the_token_is_turned_away(cluster: dict[str, str]):
    bare = {**cluster, "RAY_AUTH_MODE": "disabled"}
    bare.pop("RAY_AUTH_TOKEN_PATH")
    done = submit(bare, "ray_jobs/finetune.py")
    assert done.returncode != 0
    assert "Unauthorized" in done.stdout + done.stderr
