"""Requests that Schemathesis makes up from the OpenAPI description, right ones and wrong ones."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.mark.slow
def test_made_up_requests_get_the_answers_that_the_description_promises(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 17
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=10,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Case) -> None:
                case.call_and_validate(checks=CHECKS)

            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with GET /health
                ask()


@pytest.mark.slow
def test_a_client_generator_makes_a_client_that_searches(address: str, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{address}/search?q=red+shoe&k=3", timeout=60) as answer:
        expected = json.load(answer)
    (tmp_path / "config.yaml").write_text(
        "content_type_overrides: {image/jpeg: application/octet-stream}"  # it knows no pictures
    )
    generate = ["generate", "--url", f"{address}/openapi.json", "--config", "config.yaml"]
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "openapi_python_client",
            *generate,
            "--meta",
            "none",
            "--output-path",
            "client",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "WARNING" not in made.stdout + made.stderr
    search = """
import json, sys
from client import Client
from client.api.default import search
found = search.sync(client=Client(base_url=sys.argv[1]), q="red shoe", k=3)
print(json.dumps([hit.product_id for hit in found.hits]))
"""
    searched = subprocess.run(
        [sys.executable, "-c", search, address],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert searched.returncode == 0, searched.stderr
    assert json.loads(searched.stdout) == [hit["product_id"] for hit in expected["hits"]]
