"""The explorer's server, as it runs: real requests to a real server, with small models."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from absynth import data, zoo
from absynth.explorer import samples
from absynth.explorer.guard import Busy, Gone, Limits, Slots
from absynth.explorer.serve import listen
from absynth.explorer.shelf import Shelf
from absynth.explorer.wire import decode, encode
from absynth.norms import parse
from absynth.pictures import frame
from browser import serving
from small_models import write_all

NN = "nearest-neighbor"  # of 200 digits: small, right most of the time, and certified


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[httpx.Client]:
    patient = Limits(attack_seconds=600)  # a busy machine is slow
    with (
        serving(Shelf(weights), patient) as address,
        httpx.Client(base_url=address, timeout=600, trust_env=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def digit() -> Tensor:
    """A test image (1,28,28) of the embedded digits."""
    return data.load("digits", "test")[0][0]


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_page_and_all_it_needs_come_from_the_server(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "absynth" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name in ("main.js", "look.js", "attack.js", "compare.js", "pad.js", "paint.js", "wire.js"):
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200 and "javascript" in answer.headers["content-type"]
        assert "http://" not in answer.text and "https://" not in answer.text
    assert "url(" not in client.get("/static/style.css").text
    assert [one["name"] for one in client.get("/api/state").json()["models"]] == list(zoo.names())


@pytest.mark.parametrize("name", ["abs", "prototype-abs", "cnn"])
def test_a_look_is_what_the_library_says(client: httpx.Client, weights: Path, digit: Tensor, name: str) -> None:
    look = client.post("/api/look", json={"model": name, "image": encode(digit)}).json()
    assert torch.equal(decode(look["image"]), digit)
    model: Any = zoo.load(name, folder=weights)
    if name == "cnn":
        assert look["explanation"] is None and look["certified"] is None and not look["answer"]["can_refuse"]
        expected = model(digit[None]).softmax(1)
    else:
        analysis = model.analyze(digit[None])
        expected = analysis.probabilities
        torch.testing.assert_close(torch.tensor([look["explanation"]["energies"]]), analysis.energies)
        drawn = [np.frombuffer(base64.b64decode(text), np.uint8) for text in look["explanation"]["reconstructions"]]
        assert np.abs(np.stack(drawn) / 255 - analysis.reconstructions[0].flatten(1).numpy()).max() < 0.003
    torch.testing.assert_close(torch.tensor([look["answer"]["probabilities"]]), expected.float(), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert look["answer"]["label"] == int(model(digit[None]).argmax())


def test_a_drawing_is_framed_as_mnist_is(client: httpx.Client) -> None:
    ink = np.zeros((112, 112), np.uint8)
    ink[20:30, 30:80] = 255
    ink[30:90, 60:70] = 255
    asked = {"width": 112, "height": 112, "data": base64.b64encode(ink.tobytes()).decode()}
    look = client.post("/api/look", json={"model": NN, "ink": asked}).json()
    expected = frame(torch.from_numpy(ink[20:90, 30:80].astype(np.float32) / 255))
    assert torch.equal(decode(look["image"])[0], expected)
    blank = {**asked, "data": base64.b64encode(bytes(112 * 112)).decode()}
    answer = client.post("/api/look", json={"model": NN, "ink": blank})
    assert answer.status_code == 400 and answer.json()["error"].startswith("nothing is drawn")


@pytest.mark.parametrize("norm", ["l0", "l1", "l2", "linf"])
def test_an_attack_finds_what_holds(client: httpx.Client, weights: Path, digit: Tensor, norm: str) -> None:
    certified = client.post("/api/look", json={"model": NN, "image": encode(digit)}).json()["certified"]
    told = events(client, "/api/attack", {"model": NN, "image": encode(digit), "norm": norm})
    assert [one["event"] for one in told[:-1]] == ["searching"] * (len(told) - 1)
    done = told[-1]
    assert done["event"] == "done" and not done["stopped"] and done["queries"] > 10
    found = decode(done["image"])
    model = zoo.load(NN, folder=weights)
    assert int(model(digit[None]).argmax()) == done["label"]
    assert int(model(found[None]).argmax()) == done["adversarial_label"] != done["label"]
    assert done["distance"] == float(parse(norm).distance(found[None], digit[None]))
    # The radius is proven: what an attack finds lies beyond it.
    assert 0 < certified[norm] <= done["distance"]
    closer = [one["distance"] for one in told if one.get("distance") is not None]
    assert closer == sorted(closer, reverse=True)


def test_an_attack_with_a_target(client: httpx.Client, weights: Path, digit: Tensor) -> None:
    label = int(zoo.load(NN, folder=weights)(digit[None]).argmax())
    asked = {"model": NN, "image": encode(digit), "norm": "l2"}
    done = events(client, "/api/attack", {**asked, "target": (label + 3) % 10})[-1]
    assert done["adversarial_label"] == (label + 3) % 10
    same = events(client, "/api/attack", {**asked, "target": label})[-1]
    assert same["event"] == "error" and same["error"].startswith(f"the model says {label} already")
    beyond = events(client, "/api/attack", {**asked, "target": 77})[-1]
    assert beyond["error"].startswith("target is 77; the model has classes 0 to 9")


def test_a_deadline_ends_an_attack(weights: Path, digit: Tensor) -> None:
    with serving(Shelf(weights), Limits(attack_seconds=0)) as address, httpx.Client(base_url=address) as client:
        client.timeout = httpx.Timeout(300)
        done = events(client, "/api/attack", {"model": NN, "image": encode(digit), "norm": "l2"})[-1]
    # The time is up before the first question: the attack ends, and says so.
    assert done["event"] == "done" and done["stopped"] and done["image"] is None


def test_one_attack_at_a_time_and_hanging_up_ends_it(client: httpx.Client, digit: Tensor) -> None:
    slow = {"model": "abs", "image": encode(digit), "norm": "l0"}
    quick = {"model": NN, "image": encode(digit), "norm": "l2"}
    with client.stream("POST", "/api/attack", json=slow) as first:
        assert first.status_code == 200
        second = client.post("/api/attack", json=quick)
        assert second.status_code == 429 and second.json()["error"].startswith("another attack is running")
        assert "retry-after" in second.headers
        # A look is answered meanwhile.
        assert client.post("/api/look", json={"model": NN, "image": encode(digit)}).status_code == 200
    until = time.monotonic() + 60
    while (again := client.post("/api/attack", json=quick)).status_code == 429:
        assert time.monotonic() < until, "the attack goes on although its client has hung up"
        time.sleep(0.1)
    assert again.status_code == 200


def test_every_model_answers_and_one_that_is_missing_says_why(client: httpx.Client, tmp_path: Path) -> None:
    told = events(client, "/api/answers", {"image": encode(samples.sample("noise", 0))})
    answers = [one["answer"] for one in told if one["event"] == "answer"]
    assert [one["model"] for one in answers] == list(zoo.names())
    assert all(abs(sum(one["probabilities"]) - 1) < 1e-4 for one in answers)
    with serving(Shelf(tmp_path)) as address, httpx.Client(base_url=address, timeout=300) as bare:
        told = events(bare, "/api/answers", {"image": encode(samples.sample("noise", 0))})
        for name in zoo.names():  # asked for by name, each says how to come by it
            refused = bare.post("/api/look", json={"model": name, "image": encode(samples.sample("noise", 0))})
            assert refused.status_code == 400 and "train" in refused.json()["error"], (name, refused.text)
    # Models without weights are not offered; this one needs none, but a header that says which data it is made of.
    assert [(one["event"], one["model"]) for one in told] == [
        (event, "nearest-neighbor") for event in ("asking", "error")
    ]
    assert all("train it with" in one["error"] for one in told if one["event"] == "error")


def test_no_scribble_is_a_bar() -> None:
    for seed in range(40):
        ink = samples.sample("scribble", seed)[0] > 0.3
        high, wide = int(ink.any(1).sum()), int(ink.any(0).sum())
        assert min(high, wide) > 0.7 * max(high, wide)


def test_test_images_and_samples(client: httpx.Client) -> None:
    images, labels = data.load("digits", "test")
    told = client.get("/api/test").json()
    assert told["name"] == "digits" and told["count"] == len(images)
    third = client.get("/api/test/3").json()
    assert torch.equal(decode(third["image"]), images[3]) and third["label"] == str(int(labels[3]))
    beyond = client.get(f"/api/test/{len(images)}")
    assert beyond.status_code == 400 and f"from 0 to {len(images) - 1}" in beyond.json()["error"]
    for kind in samples.KINDS:
        one, same, other = (decode(client.get(f"/api/sample/{kind}/{seed}").json()["image"]) for seed in (5, 5, 6))
        assert torch.equal(one, same) and not torch.equal(one, other)
        assert one.max() > 0.9
    assert "known: letter, noise, scribble" in client.get("/api/sample/song/1").json()["error"]


def png(array: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format)
    return file.getvalue()


def test_pictures(client: httpx.Client) -> None:
    paper = np.full((90, 120), 255, np.uint8)
    paper[20:70, 50:58] = 0
    found = decode(client.post("/api/picture", content=png(paper)).json()["image"])
    assert found.shape == (1, 28, 28) and found.max() == 1
    for content, words in (
        (b"no picture at all", "is not a picture"),
        (png(np.zeros((3000, 2000), np.uint8)), "too many pixels"),
        (png(np.zeros((90, 90, 3), np.uint8), "EPS"), "is not a picture"),  # Pillow would start Ghostscript
        (png(np.full((90, 90), 7, np.uint8)), "is blank"),
    ):
        answer = client.post("/api/picture", content=content)
        assert answer.status_code == 400 and words in answer.json()["error"]
        assert len(answer.json()["error"].splitlines()) == 1


BAD_VALUES = base64.b64encode(np.full(784, np.nan, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "abs"}, 400, "send one of them"),
        ({"model": "abs", "image": BAD_VALUES}, 400, "outside [0,1]"),
        ({"model": "abs", "image": "*" * len(BAD_VALUES)}, 400, "is not base64"),
        ({"model": "abs", "image": "AAAA"}, 422, "at least"),
        ({"model": "apse", "image": encode(torch.zeros(1, 28, 28))}, 400, "did you mean abs"),
        ({"model": "abs", "image": encode(torch.zeros(1, 28, 28)), "run": "me"}, 422, "not permitted"),
        ({"model": "abs", "ink": {"width": 9, "height": 9, "data": "AAAA"}}, 400, "expected 81"),
        ({"model": "abs", "ink": {"width": 9000, "height": 9, "data": "AAAA"}}, 422, "less than or equal"),
    ],
)
def test_bad_input_is_one_clear_line(client: httpx.Client, body: dict[str, Any], status: int, words: str) -> None:
    answer = client.post("/api/look", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"] and len(answer.json()["error"].splitlines()) == 1


def test_other_names_and_other_sites_are_turned_away(client: httpx.Client) -> None:
    port = client.base_url.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        answer = client.get("/api/state", headers={"Host": host})
        assert answer.status_code == 400 and "open the explorer as" in answer.text
    assert client.get("/api/state", headers={"Host": f"localhost:{port}"}).status_code == 200
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert client.get("/api/state", headers=headers).status_code == 403
    assert client.get("/api/state", headers={"Origin": f"http://127.0.0.1:{port}"}).status_code == 200
    assert client.get("/nowhere").status_code == 404
    assert client.get("/static/../app.py").status_code == 404


def test_requests_are_bounded_in_size_and_time(weights: Path) -> None:
    with serving(Shelf(weights), Limits(body_seconds=0.3)) as address:
        large = httpx.post(f"{address}/api/look", content=b"x" * (129 * 1024), timeout=60, trust_env=False)
        assert large.status_code == 413 and "more than 128 KiB" in large.json()["error"]
        port = int(address.rsplit(":", 1)[1])
        for start in (
            b"Content-Length: 1000\r\n\r\nhalf of it",
            b"Transfer-Encoding: chunked\r\n\r\n" + b"20000\r\n" + b"x" * 0x20000 + b"\r\n1\r\nx\r\n",  # no length told
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
                raw.sendall(f"POST /api/look HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode() + start)
                status = raw.recv(4096).split()[1]
            assert status == (b"408" if b"half" in start else b"413")


def test_slots_bound_what_runs_and_what_waits() -> None:
    async def scenario() -> None:
        slots = Slots(1, 1, "full")
        opened = asyncio.Event()
        loop = asyncio.get_running_loop()
        done: list[str] = []

        def work(name: str) -> str:
            asyncio.run_coroutine_threadsafe(opened.wait(), loop).result(30)
            done.append(name)
            return name

        async def hung_up() -> bool:
            return True

        first = asyncio.ensure_future(slots.run(lambda: work("first")))
        while slots.inside < 1:
            await asyncio.sleep(0)
        superseded = asyncio.ensure_future(slots.run(lambda: work("superseded"), hung_up))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="full"):
            await slots.run(lambda: work("third"))
        opened.set()
        assert await first == "first"
        with pytest.raises(Gone):
            await superseded
        assert await slots.run(lambda: work("last")) == "last"
        # Of what nobody waits for any more, nothing is computed, and nothing stays behind.
        assert done == ["first", "last"] and slots.inside == 0

    asyncio.run(scenario())


def test_without_the_extra_the_command_names_the_fix() -> None:
    code = "import sys; sys.modules['fastapi'] = None; sys.argv = ['absynth', 'explore']; import absynth.cli as cli"
    code += "; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the explorer needs fastapi: pip install 'absynth[explorer]'\n"


def test_the_command_serves_until_it_is_interrupted(weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "absynth", "explore", "--no-browser", "--weights", str(weights), "--port"]
    with listen(0) as taken:
        port = taken.getsockname()[1]
        refused = subprocess.run([*command, str(port)], capture_output=True, text=True, timeout=300)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: cannot listen on port {port}")
        assert len(refused.stderr.splitlines()) == 1
    with subprocess.Popen([*command, "0"], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        address = line.split()[4]
        assert line.startswith("the explorer is at http://127.0.0.1:")
        until = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(address, timeout=60, trust_env=False).status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < until
                time.sleep(0.1)
        os.kill(running.pid, signal.SIGINT)
        assert running.wait(60) == 0
        assert running.stderr.read() == "the explorer has ended\n"
    assert list(tmp_path.iterdir()) == []  # nothing was written
