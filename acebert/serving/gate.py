"""Before any route: overload, the API key, and bodies that are too large.

A refusal costs nothing of what is scarce: it is written before a body is read or parsed.
"""

import contextlib
import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acebert.serving.metrics import Metrics

OPEN = ("/health", "/ready", "/photos/", "/page/")  # besides the page itself: no key
ENCODING = ("/products", "/search/photo")  # sent a body, these wait for the product encoder
OF_ALL = 8  # requests that are let in at a time, for each of these
RETRY_SECONDS = 1


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        max_requests: at a time; more are answered 503 with Retry-After. An eighth of them may wait
            for the product encoder: it does one thing after another, and shoppers would find no
            place beside an importer's hundred requests, nor their bodies one in memory.
        max_body: of a request [bytes]; more is answered 413.
        key: that requests have to carry as X-API-Key (none: anybody may ask).
    """

    def __init__(
        self, app: ASGIApp, max_requests: int, max_body: int, key: str | None, metrics: Metrics
    ) -> None:
        self.app, self.key, self.metrics = app, key, metrics
        self.max_requests, self.max_body = max_requests, max_body
        self.running = self.encoding = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = scope["path"]
        probed = path in ("/health", "/ready")
        if not probed:
            send = self._counted(send)
        encodes = scope["method"] in ("PUT", "POST") and path.startswith(ENCODING)
        if self.running >= self.max_requests and not probed:
            await self._refuse(send, 503, "overloaded: try again")
        elif encodes and self.encoding >= max(1, self.max_requests // OF_ALL):
            await self._refuse(send, 503, "overloaded with products and photos: try again")
        elif not self._may(path, headers):
            await self._refuse(send, 401, "X-API-Key is missing or wrong")
        elif self._length(headers) > self.max_body:
            await self._refuse(send, 413, f"the body is larger than {self.max_body:,} bytes")
        else:
            self.running += 1
            self.encoding += encodes
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self.running -= 1
                self.encoding -= encodes

    def _counted(self, send: Send) -> Send:
        """Count the answer by its status, whoever gives it."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answers.inc(str(message["status"]))
            await send(message)

        return counted

    def _may(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.key is None or path == "/" or path.startswith(OPEN):
            return True
        return hmac.compare_digest(headers.get(b"x-api-key", b""), self.key.encode())

    @staticmethod
    def _length(headers: dict[bytes, bytes]) -> int:
        length = headers.get(b"content-length", b"0")
        return int(length) if length.isdigit() else 0

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the bytes of a body that does not say its length beforehand; whatever the app
        makes of its end, the answer is then 413."""
        received, started = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if started or received <= self.max_body:
                started = True
                await send(message)

        with contextlib.suppress(_TooLargeError):
            await self.app(scope, counted, noted)
        if not started and received > self.max_body:
            await self._refuse(send, 413, f"the body is larger than {self.max_body:,} bytes")

    async def _refuse(self, send: Send, status: int, reason: str) -> None:
        self.metrics.refused.inc(str(status))
        body = json.dumps({"error": reason}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if status == 503:
            headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _TooLargeError(Exception):
    pass
