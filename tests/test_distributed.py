"""The evaluation on a real Ray cluster of several nodes on this machine: the same rows, whatever dies on the way."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluation_models as models
from absynth import distributed, zoo
from absynth.attacks.base import Attack
from absynth.cli import main
from absynth.errors import InputError
from absynth.evaluation import Ledger, Progress, model_digest, verify
from small_models import write_all

ROOT = Path(__file__).parent.parent
NET = "evaluation_models:linear"
# Ray's own: files of the processes it started, which it leaves to the system to close, and what it says of its future.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings(
        r"ignore:Exception ignored in. <(_io\.|socket|function Popen\.__del__):pytest.PytestUnraisableExceptionWarning"
    ),
]


class Nodes:
    """A head and two more nodes, a core each, bound to 127.0.0.1."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster  # here: importing Ray takes seconds

        self.cluster: Any = Cluster()
        self.workers: list[Any] = []
        self.add()
        self.add()
        self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **more: Any) -> None:
        options = {
            "num_cpus": 1,
            "object_store_memory": 80_000_000,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,
        }
        for attempt in range(3):  # Ray gives a node half a minute, which a busy machine exceeds
            try:
                self.workers.append(self.cluster.add_node(**options, **more))
                return
            except Exception:
                if attempt == 2:
                    raise

    def remove(self, computing: Path | None = None) -> None:
        """Kill all processes of the last node, or of the one that computes a batch as the log says."""
        chosen = self.workers[-1]
        if computing is not None:
            raylets = {node.all_processes["raylet"][0].process.pid: node for node in self.workers[1:]}
            chosen = raylets[parent(busy(computing, under=raylets))]
        self.workers.remove(chosen)
        self.cluster.remove_node(chosen, allow_graceful=False)


def parent(pid: int) -> int:
    """The process that started another; 0 where that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0


def busy(log: Path, under: Container[int] | None = None) -> int:
    """A process that is computing a batch right now (started by one of ``under``), as the log of ``Traced`` says."""
    for _ in range(600):
        state = {int(pid): what for what, pid in map(str.split, log.read_text().splitlines())}
        for pid, what in reversed(state.items()):
            if what == "begin" and parent(pid) and (under is None or parent(pid) in under):
                return pid
        time.sleep(0.05)
    raise AssertionError("nothing is computed")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Workers import what this process imports; they inherit the environment of the nodes.
    before = os.environ.copy()
    os.environ.update(PYTHONPATH=str(ROOT / "src"), RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    distributed._stay_on_loopback("127.0.0.1:0")
    try:
        started = Nodes()
        yield started
        started.cluster.shutdown()
        del started
        gc.collect()  # now, where the warnings of Ray's processes are expected, not in the midst of another test
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A batch has one thread on the cluster: so it must have here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_cluster(address: str, out: Path, suite: tuple[Attack, ...] = models.SUITE, **options: Any) -> Any:
    with distributed.connect(address, models=[NET], threads=1) as cluster:
        return models.run(out, suite=suite, executor=cluster.executor(NET), **options)


def contents(folder: Path) -> tuple[dict[Any, Any], list[Any], int]:
    """All that a ledger says of the linear model, seconds apart, by key; the clean answers; how many rows there are."""
    with Ledger(folder) as ledger:
        digest = model_digest(models.Linear())
        found, clean = ledger.rows(digest), ledger.clean(digest)
    rows = {
        row.key: (
            replace(row, seconds=0.0, adversarial=None),
            None if row.adversarial is None else row.adversarial.numpy().tobytes(),
        )
        for row in found
    }
    answers = [(row.image, row.prediction, row.logits.numpy().tobytes()) for row in clean if row.logits is not None]
    return rows, answers, len(found)


def test_the_same_rows_as_in_one_process(nodes: Nodes, tmp_path: Path) -> None:
    seen: list[Progress] = []
    models.run(tmp_path / "here")
    on_cluster(nodes.address, tmp_path / "there", progress=seen.append)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert contents(tmp_path / "there")[2] == 32
    assert seen[-1].done == seen[-1].total == 32
    assert verify(tmp_path / "there", models={"net": models.Linear()}).holds
    assert torch.get_num_threads() == 1


def test_a_worker_and_a_node_that_die(nodes: Nodes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    suite = (models.Traced(str(log), seconds=1.0),)
    seen: list[int] = []

    def disturb(progress: Progress) -> None:
        seen.append(progress.done)
        if len(seen) == 4:  # two are misclassified: nothing to compute
            os.kill(busy(log), signal.SIGKILL)
        if len(seen) == 6:
            nodes.remove(computing=log)

    on_cluster(nodes.address, tmp_path / "there", suite, batch_size=1, images=12, progress=disturb)
    started = log.read_text().count("begin")
    models.run(tmp_path / "here", suite=suite, batch_size=1, images=12)
    assert len(seen) == 12 and started > 10  # ten images are classified rightly; what died began once more
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    nodes.add()


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import evaluation_models as models, test_distributed as this
def tell(progress):
    print(progress.done, flush=True)
this.on_cluster(sys.argv[1], Path(sys.argv[2]), (models.Traced(sys.argv[3]),), batch_size=1, images=12, progress=tell)
"""


def test_kill_9_of_the_driver(nodes: Nodes, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "there"
    command = [sys.executable, "-c", DRIVER, nodes.address, str(out), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for _ in range(4):
            done = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    kept = contents(out)[0]
    assert 4 <= done <= len(kept) < 12
    seen: list[Progress] = []
    suite = (models.Traced(str(log)),)
    on_cluster(nodes.address, out, suite, batch_size=1, images=12, progress=seen.append)
    assert len(seen) == 12 - len(kept)  # a set difference: what has a row is not done again
    models.run(tmp_path / "here", suite=suite, batch_size=1, images=12)
    assert contents(out) == contents(tmp_path / "here") and contents(out)[2] == 12


def test_a_batch_that_kills_its_workers(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "RETRIES", 0)
    suite = (models.Traced(str(tmp_path / "log"), 0.0, deadly=True),)
    with pytest.raises(InputError, match="a batch ended every worker it was given to") as caught:
        on_cluster(nodes.address, tmp_path / "there", suite, batch_size=1)
    assert "\n" not in str(caught.value)


def test_another_model_on_a_worker(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a worker loaded 'evaluation_models:linear' with digest"):
        on_cluster(nodes.address, tmp_path, model=models.Linear(seed=5))


def test_more_threads_than_any_node_has(nodes: Nodes) -> None:
    message = "a batch takes 99 threads, the largest node of the cluster has 1 CPUs"
    with pytest.raises(InputError, match=message), distributed.connect(nodes.address, threads=99):
        pass


def test_from_the_command_line_and_stopped(nodes: Nodes, tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", "evaluation_models:digits", "--data", "digits", "--images", "40"]
    arguments += ["--attacks", "deepfool-l2", "--out", str(tmp_path), "--cluster", nodes.address]
    # A shell that runs the tests in the background has its children ignore SIGINT.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; from absynth.__main__ import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        ledger = tmp_path / "evaluation_models-digits" / "ledger.sqlite"
        for _ in range(600):  # as soon as it works
            if ledger.exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("stopped: all finished rows are kept in")
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "deepfool-l2" in done.stdout
    expected = ("attacking: ", "warning: ", f"{tmp_path} holds ")  # the last where a batch had been finished
    assert [line for line in done.stderr.splitlines() if not line.startswith(expected)] == []


def test_gpus_are_used_where_there_are_some(nodes: Nodes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    nodes.add(num_gpus=1)  # Ray believes it; the worker looks for itself, and stays on the CPU where there is none
    with distributed.connect(nodes.address, models=[NET], threads=1) as cluster:
        assert cluster.gpus and cluster._places() == 1  # of the four cores, the one beside the GPU
        models.run(tmp_path / "there", suite=(models.Traced(str(log), 0.1),), executor=cluster.executor(NET))
    assert len(set(log.read_text().split())) == 3  # begin, end, and one process
    nodes.remove()


def test_nothing_answers(tmp_path: Path) -> None:
    for address, message in {
        "127.0.0.1:9": "no Ray cluster answers at 127.0.0.1:9",
        "nonsense": "cluster address is 'nonsense': expected auto, or HOST:PORT",
        "host:port": "cluster address is 'host:port': expected auto, or HOST:PORT",
    }.items():
        with pytest.raises(InputError, match=message) as caught, distributed.connect(address):
            pass
        assert "\n" not in str(caught.value)


def test_a_bad_address_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = "absynth evaluate --model evaluation_models:digits --attacks deepfool-l2 --cluster 127.0.0.1:9"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: no Ray cluster answers at 127.0.0.1:9")


def test_auto_finds_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert distributed._resolved("auto") is None  # then this machine's cores
    noted = tmp_path / "ray" / "ray_current_cluster"
    noted.parent.mkdir()
    noted.write_text("127.0.0.1:9\n")
    assert distributed._resolved("auto") is None  # it has ended
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        noted.write_text(f"{address}\n")
        assert distributed._resolved("auto") == address
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # named by the user: no other will do
        with pytest.raises(InputError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
            distributed._resolved("auto")


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'absynth\[cluster\]'$"), distributed.connect():
        pass


def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, threads in {"3": 3, "2,1": 2}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert distributed._threads_wanted() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(InputError, match="OMP_NUM_THREADS is 'many'"):
        distributed._threads_wanted()


@pytest.mark.parametrize("name", ["cnn", "binary-abs"])
def test_weights_travel_as_files(name: str, tmp_path: Path) -> None:
    folder = write_all(tmp_path / "weights")
    source = distributed.Source.of(name, folder)
    digest = model_digest(zoo.load(name, folder=folder))
    for file in folder.iterdir():
        file.unlink()  # a worker on another machine has none of them
    assert model_digest(source.load()) == digest


def test_what_is_installed_does_not_travel() -> None:
    assert distributed._module_path(NET) == str(ROOT / "tests" / "evaluation_models.py")
    for installed in ("torch:factory", "json:factory", "no_such_module:factory"):
        assert distributed._module_path(installed) is None
