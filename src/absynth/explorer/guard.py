"""What stands between a request and the work: who may ask, how much may be sent, how many may wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_Result = TypeVar("_Result")

HEADERS = {
    # Scripts, styles and requests of this server alone; blob: and data: for pictures that the page itself makes.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may ask. Sizes in bytes, times in seconds.

    ``looks``, ``attacks``: computed at once; ``waiting``: looks that may wait for their turn. ``attack_seconds``: after
    which an attack ends with what it has.
    """

    body: int = 128 * 1024
    picture: int = 8 * 1024 * 1024
    picture_pixels: int = 2048 * 2048
    body_seconds: float = 10.0
    looks: int = 1
    waiting: int = 8
    attacks: int = 1
    attack_seconds: float = 60.0
    connections: int = 64


class Busy(Exception):
    """Too many requests at once; the message says what to do."""


class Gone(Exception):
    """The client has hung up: nobody waits for the answer."""


class Slots:
    """``running`` pieces of work at once, each in a thread of its own; ``waiting`` more may wait, others are Busy."""

    def __init__(self, running: int, waiting: int, busy: str) -> None:
        self._free = asyncio.Semaphore(running)
        self._room, self._busy = running + waiting, busy
        self.inside = 0  # running or waiting

    async def run(self, work: Callable[[], _Result], gone: Callable[[], Awaitable[bool]] | None = None) -> _Result:
        """The result of ``work``, in its turn. Raises Busy without room, Gone if ``gone`` says so at its turn."""
        return await asyncio.shield(await self.start(work, gone))

    async def start(
        self, work: Callable[[], _Result], gone: Callable[[], Awaitable[bool]] | None = None
    ) -> asyncio.Future[_Result]:
        """Begin ``work`` in its turn. The slot is free again when the work has ended, whoever still waits for it."""
        if self.inside >= self._room:
            raise Busy(self._busy)
        self.inside += 1
        try:
            await self._free.acquire()
            try:
                if gone is not None and await gone():
                    raise Gone
                thread = asyncio.get_running_loop().run_in_executor(None, work)
            except BaseException:
                self._free.release()
                raise
        except BaseException:
            self.inside -= 1
            raise
        thread.add_done_callback(self._ended)
        return thread

    def _ended(self, thread: asyncio.Future[Any]) -> None:
        self._free.release()
        self.inside -= 1
        if not thread.cancelled():
            thread.exception()  # seen, even where nobody waits any more


class Guard:
    """ASGI middleware: wrong hosts and foreign pages are turned away, bodies are bounded, headers are added."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no websockets

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/api/") else "no-cache")
            await send(message)

        refused = self._refusal(Headers(scope=scope))
        if refused is None:
            most = self.limits.picture if scope["path"] == "/api/picture" else self.limits.body
            body = await self._body(receive, Headers(scope=scope), most)
            if isinstance(body, bytes):
                await self.app(scope, _replay(body, receive), send_with_headers)
                return
            refused = body
        status, error = refused
        await send_with_headers(
            {
                "type": "http.response.start",
                "status": status,
                # What was not read of the body would be taken for the next request.
                "headers": [(b"content-type", b"application/json"), (b"connection", b"close")],
            }
        )
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name, _, port = host.partition(":")
        if name not in HOSTS or not (port == "" or port.isdecimal()):
            # Another name that leads to this machine: a page of that name could read the answers (DNS rebinding).
            return 400, f"the Host header is {host!r}: open the explorer as http://127.0.0.1:PORT"
        origin = headers.get("origin")
        foreign = origin is not None and origin != f"http://{host}"
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            # Links from elsewhere may open the page; nothing else of elsewhere may ask for anything.
            if not foreign and headers.get("sec-fetch-mode") == "navigate":
                return None
            return 403, "another site's page may not use the explorer: open it as http://127.0.0.1:PORT"
        return None

    async def _body(self, receive: Receive, headers: Headers, most: int) -> bytes | tuple[int, str]:
        """The whole body, or why not."""
        too_large = 413, f"more than {most // 1024:,} KiB were sent: send a smaller picture"
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            return too_large
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, "the request broke off"
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        return too_large
        except TimeoutError:
            return 408, f"the request was not complete after {self.limits.body_seconds:g} s: try again"
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever comes: the client hanging up."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
