"""The server: a page and the questions it may ask. Nothing a client sends is executed or written."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from torch import Tensor

from absynth import __version__, data, zoo
from absynth.errors import InputError
from absynth.explorer import samples, search
from absynth.explorer.guard import Busy, Gone, Guard, Limits, Slots
from absynth.explorer.shelf import Shelf
from absynth.explorer.wire import (
    SIDE,
    Answer,
    Answered,
    AnswersRequest,
    Asking,
    AttackRequest,
    Failed,
    Found,
    Listed,
    Look,
    LookRequest,
    Picture,
    Searching,
    State,
    TestSet,
    decode,
    decode_ink,
    encode,
)
from absynth.inventory import label_names
from absynth.pictures import frame, load_picture

STATIC = Path(str(files("absynth"))) / "explorer" / "static"
TICK = 0.25  # seconds between two lines about an attack
LINES = "application/x-ndjson"
Index = Annotated[int, InPath(ge=0, le=2**31 - 1)]


def create_app(shelf: Shelf, limits: Limits | None = None) -> FastAPI:
    """The explorer as an ASGI application; models and images are taken from ``shelf``."""
    bounds = limits or Limits()
    app = FastAPI(title="absynth explorer", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, limits=bounds)
    _errors(app)
    looks = Slots(bounds.looks, bounds.waiting, "too many questions at once: wait a moment and try again")
    attacks = Slots(bounds.attacks, 0, "another attack is running: stop it or wait for its end, then try again")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/state")
    async def state() -> State:
        listed = [
            Listed(name=name, description=zoo.DESCRIPTIONS[name], state=shelf.state(name)) for name in shelf.names()
        ]
        return State(
            version=__version__, models=listed, samples=list(samples.KINDS), attack_seconds=bounds.attack_seconds
        )

    @app.post("/api/look")
    async def look(asked: LookRequest, request: Request) -> Look:
        if (asked.image is None) == (asked.ink is None):
            raise InputError("the request has both an image and a drawing, or neither: send one of them")

        def work() -> Look:
            if asked.image is not None:
                image = decode(asked.image)
            else:
                assert asked.ink is not None
                image = frame(_cropped(decode_ink(asked.ink)), SIDE)[None]
            return shelf.get(asked.model).look(image)

        return await looks.run(work, request.is_disconnected)

    @app.post("/api/picture")
    async def picture(request: Request) -> Picture:
        body = await request.body()

        def work() -> Picture:
            image = load_picture(io.BytesIO(body), SIDE, most_pixels=bounds.picture_pixels)
            return Picture(image=encode(image), title="your picture")

        return await looks.run(work, request.is_disconnected)

    @app.get("/api/test")
    async def test_set(request: Request) -> TestSet:
        def work() -> TestSet:
            name, _, labels = shelf.test_images()
            return TestSet(name=name, count=len(labels), names=list(label_names(name, int(labels.max()) + 1)))

        return await looks.run(work, request.is_disconnected)

    @app.get("/api/test/{index}")
    async def test_image(index: Index, request: Request) -> Picture:
        def work() -> Picture:
            name, images, labels = shelf.test_images()
            if index >= len(images):
                raise InputError(f"there is no test image {index}: choose one from 0 to {len(images) - 1}")
            names = data.class_names(name)
            return Picture(
                image=encode(images[index]), title=f"test image {index} of {name}", index=index,
                label=names[int(labels[index])],
            )  # fmt: skip

        return await looks.run(work, request.is_disconnected)

    @app.get("/api/sample/{kind}/{seed}")
    async def sample(kind: str, seed: Index) -> Picture:
        return Picture(image=encode(samples.sample(kind, seed)), title=kind)

    @app.post("/api/answers")
    async def answers(asked: AnswersRequest) -> StreamingResponse:
        image = decode(asked.image)

        async def lines() -> AsyncIterator[str]:
            for name in shelf.names():
                yield _line(Asking(model=name, loading=shelf.state(name) != "ready"))
                try:
                    yield _line(Answered(answer=await looks.run(partial(_answer, shelf, name, image))))
                except Exception as error:
                    yield _line(Failed(error=_told(error), model=name))

        return StreamingResponse(lines(), media_type=LINES)

    @app.post("/api/attack")
    async def attack(asked: AttackRequest) -> StreamingResponse:
        image = decode(asked.image)
        ready: asyncio.Future[search.Watch] = asyncio.get_running_loop().create_future()
        left = asyncio.Event()  # the client has hung up

        def give(watched: search.Watch) -> None:
            if left.is_set():
                watched.stop.set()
            elif not ready.done():
                ready.set_result(watched)

        def work() -> search.Result:
            loop = ready.get_loop()
            try:
                model = shelf.get(asked.model).model
                watched = search.watch(model, image, asked.norm, bounds.attack_seconds)
            except BaseException as error:
                loop.call_soon_threadsafe(_fail, ready, error)
                raise
            loop.call_soon_threadsafe(give, watched)
            return search.smallest(watched, asked.target)

        running = await attacks.start(work)  # here, not in the stream: a client without room is told by the status

        async def lines() -> AsyncIterator[str]:
            try:
                async for event in _watched(ready, running):
                    yield _line(event)
            except Exception as error:
                yield _line(Failed(error=_told(error)))
            finally:
                left.set()
                if ready.done() and not ready.cancelled() and ready.exception() is None:
                    ready.result().stop.set()

        return StreamingResponse(lines(), media_type=LINES)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _answer(shelf: Shelf, name: str, image: Tensor) -> Answer:
    return shelf.get(name).answer(image)


async def _watched(
    ready: asyncio.Future[search.Watch], running: asyncio.Future[search.Result]
) -> AsyncIterator[Searching | Found]:
    """An attack's progress, and its result."""
    yield Searching(seconds=0, queries=0)
    watched = await asyncio.shield(ready)
    shown = float("inf")
    while not running.done():
        await asyncio.wait({running}, timeout=TICK)
        news = watched.hits[-1] if watched.nearest < shown else None
        if news is not None:
            shown = news[0]
        yield Searching(
            seconds=watched.seconds,
            queries=watched.queries,
            image=None if news is None else encode(news[1]),
            distance=None if news is None else news[0],
        )
    result = running.result()
    yield Found(
        seconds=watched.seconds,
        queries=watched.queries,
        label=result.label,
        stopped=result.stopped,
        attacks=list(result.attacks),
        image=None if result.image is None else encode(result.image),
        distance=result.distance,
        adversarial_label=result.adversarial_label,
    )


def _fail(ready: asyncio.Future[search.Watch], error: BaseException) -> None:
    if not ready.done():
        ready.set_exception(error)


def _line(event: BaseModel) -> str:
    return event.model_dump_json() + "\n"


def _told(error: Exception) -> str:
    """One line about an error."""
    if isinstance(error, (InputError, Busy)):
        return str(error)
    return " ".join(f"a fault of absynth itself, {type(error).__name__}: {error}".split())


def _cropped(ink: Tensor) -> Tensor:
    """The part (h,w) of a drawing that holds ink."""
    rows, columns = ink.amax(1).nonzero(), ink.amax(0).nonzero()
    return ink[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _errors(app: FastAPI) -> None:
    """Every error is one line, {"error": ...}."""

    def answer(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers=headers or None)

    @app.exception_handler(InputError)
    async def bad_input(_request: Request, error: InputError) -> Response:
        return answer(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def bad_shape(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return answer(422, f"{place}: {first['msg']}")

    @app.exception_handler(Busy)
    async def busy(_request: Request, error: Busy) -> Response:
        return answer(429, str(error), **{"Retry-After": "2"})

    @app.exception_handler(Gone)
    async def gone(_request: Request, _error: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def other(_request: Request, error: HTTPException) -> Response:
        return answer(error.status_code, f"{error.detail}: open the explorer's page at /")

    @app.exception_handler(Exception)
    async def fault(_request: Request, error: Exception) -> Response:
        return answer(500, _told(error))
