"""Lines of the request log, by a service in this process."""

import json
from typing import Any

import httpx2 as httpx
import pytest

SECRET = "anna+karenina"


@pytest.mark.parametrize(("mode", "query"), [("paths", None), ("texts", "anna karenina")])
def test_each_request_is_a_line_of_json_with_the_id_that_its_answer_has(
    with_service, capsys: pytest.CaptureFixture[str], mode: str, query: str | None
) -> None:
    async def requests(client: httpx.AsyncClient, local: Any) -> None:
        sent = {"X-Request-Id": "client-7", "X-API-Key": "hidden", "X-User-Id": "someone"}
        own = await client.get(f"/search?q={SECRET}&k=1", headers=sent)
        made = await client.get("/products/no-such", headers={"X-Request-Id": "two words"})
        refused = await client.post("/search/batch", content=b"{}", headers={"X-API-Key": "no"})
        answers.extend([own, made, refused])

    answers: list[httpx.Response] = []
    with_service(requests, key="hidden", request_log=mode)
    printed = capsys.readouterr().out.splitlines()
    logged = [json.loads(line) for line in printed if line.startswith("{")]
    assert [line["status"] for line in logged] == [200, 401, 401]
    assert [line["path"] for line in logged] == ["/search", "/products/no-such", "/search/batch"]
    assert [a.headers["x-request-id"] for a in answers] == [line["request_id"] for line in logged]
    assert logged[0]["request_id"] == "client-7"
    assert " " not in logged[1]["request_id"]
    assert logged[0].get("query") == query
    text = json.dumps(logged)
    assert ("anna" in text) == (mode == "texts")
    assert "hidden" not in text
    assert "someone" not in text


def test_no_line_is_written_where_none_is_asked_for(
    with_service, capsys: pytest.CaptureFixture[str]
) -> None:
    async def requests(client: httpx.AsyncClient, local: Any) -> None:
        answers.append(await client.get(f"/search?q={SECRET}&k=1"))

    answers: list[httpx.Response] = []
    with_service(requests)
    assert [answer.status_code for answer in answers] == [200]
    assert "x-request-id" not in answers[0].headers
    printed = capsys.readouterr().out
    assert not [line for line in printed.splitlines() if line.startswith("{")]
    assert "anna" not in printed
