"""Serving the explorer on this machine's own address."""

from __future__ import annotations

import socket
import threading
import webbrowser
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from absynth.errors import InputError
from absynth.explorer.guard import Limits

HOST = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """A socket bound to ``port`` of 127.0.0.1 (0: any free one). Raises InputError if it is taken or not allowed."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
        bound.listen()  # here: of two sockets that may reuse an address, the one that does not listen yet blocks nobody
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on port {port} ({error.strerror}): choose another with --port, or --port 0 for a free one"
        ) from error
    return bound


def server(app: FastAPI, limits: Limits | None = None) -> uvicorn.Server:
    """A server for ``app`` that says nothing unless something is wrong."""
    bounds = limits or Limits()
    return uvicorn.Server(
        uvicorn.Config(
            app, host=HOST, log_level="warning", access_log=False, ws="none", lifespan="off", server_header=False,
            limit_concurrency=bounds.connections, timeout_keep_alive=30, timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=64 * 1024,
        )
    )  # fmt: skip


def serve(app: FastAPI, port: int, *, browser: bool, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. ``say`` is told the address; with ``browser`` it is opened there."""
    bound = listen(port)
    address = f"http://{HOST}:{bound.getsockname()[1]}"
    say(f"the explorer is at {address} (Ctrl-C ends it)")
    if browser:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    try:
        server(app).run(sockets=[bound])
    finally:
        bound.close()
