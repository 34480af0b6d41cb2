"""A line of JSON for each request, on standard output: for log collectors.

    {"time": "2026-11-21T02:30:00.123+00:00", "request_id": "…", "method": "GET", "path": "/search",
     "status": 200, "ms": 4.2}

What was searched for is left out unless it is asked for: a query may name a person. No header, body
or user id is logged. The id is the client's own X-Request-Id, or made here; the answer has it too.
"""

import json
import re
import time
import uuid
from datetime import UTC, datetime
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


class RequestLog:
    """ASGI middleware.

    Args:
        app: what is behind it.
        texts: log the text of a search too.
    """

    def __init__(self, app: ASGIApp, texts: bool) -> None:
        self.app, self.texts = app, texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 500  # of what raises

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), named]}
            await send(message)

        start = time.perf_counter()
        try:
            await self.app(scope, receive, noted)
        finally:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1000 * (time.perf_counter() - start), 3),
            }
            if self.texts:
                asked = parse_qs(scope["query_string"].decode("latin-1"))
                line["query"] = asked.get("q", [None])[0]
            print(json.dumps(line), flush=True)
