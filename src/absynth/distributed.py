"""The evaluation's plan on a Ray cluster: workers compute batches, this process alone writes the ledger.

    with connect("auto") as cluster:
        evaluate("abs", images=1000, out="runs/abs", executor=cluster.executor("abs"))

The only place that knows Ray. A batch is a pure function of plan, model and images, so a batch whose worker or node
dies is computed again elsewhere, and a run whose driver dies goes on like any other: by set difference. Workers load
the model themselves, from the bytes of its weight file, from their own data or by importing its factory; its digest
must be the plan's.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from absynth import __version__, weight_files, zoo
from absynth.attacks.base import Attack
from absynth.clean import load_any
from absynth.errors import InputError
from absynth.evaluation.jobs import run_job
from absynth.evaluation.plan import Job, Plan, load_model, model_digest
from absynth.evaluation.rows import CleanRow, Row
from absynth.evaluation.run import Executor

GPU_SHARE = 0.25  # of a GPU for one batch: four processes keep it busy where one waits for Python
RETRIES = 5  # times a batch is computed again after its worker or node died, before it is taken for the cause
PATIENCE = 60.0  # seconds to wait for a node that could take a batch, when there is none
POLL = 1.0  # seconds
LOCAL_MEMORY = 200_000_000  # bytes of shared memory for a cluster of this machine alone: batches are small


@dataclass(frozen=True)
class Source:
    """Where a worker gets the model ``name`` from: the bytes of weight ``files`` by name, the first of them its own;
    where there are none, a factory, or data that the worker has, looked for in ``root`` first."""

    name: str
    files: Mapping[str, bytes]
    root: str | None = None

    @classmethod
    def of(cls, name: str, weights: str | Path | None = None, root: str | Path | None = None) -> Source:
        """The source of a model as ``absynth.clean.load_any`` takes it."""
        files: dict[str, bytes] = {}
        if ":" not in name and (path := zoo.path_of(name, weights)).is_file():
            needed = [path]
            # the decoders of Binary ABS are those of the file beside it
            if weight_files.read(path).header.get("model") == "binary-abs":
                needed.append(path.with_name("abs.safetensors"))
            files = {one.name: one.read_bytes() for one in needed}
        return cls(name, files, None if root is None else str(Path(root).resolve()))

    def load(self) -> nn.Module:
        """The model, on the CPU, in eval mode."""
        if ":" in self.name:
            return load_model(self.name)
        if not self.files:
            return load_any(self.name, root=self.root)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                (Path(folder) / name).write_bytes(content)
            return zoo.load(Path(folder) / next(iter(self.files)))


@dataclass(frozen=True)
class _Common:
    """What all batches of a run share; sent to each node once."""

    source: Source
    attacks: tuple[Attack, ...]
    model: str  # the digest
    seed: int
    threads: int
    versions: str


@dataclass(frozen=True)
class Cluster:
    """A connection to a cluster, made by ``connect``. ``threads`` are those of one batch; ``gpus`` says whether batches
    go to the nodes with a GPU."""

    threads: int
    gpus: bool

    def executor(self, name: str, *, weights: str | Path | None = None, root: str | Path | None = None) -> Executor:
        """What computes the batches of the model ``name`` (as ``absynth.clean.load_any`` takes it) on the cluster: the
        ``executor`` of ``absynth.evaluation.evaluate``. Rows come in the order in which batches are finished.

        Its iterator raises InputError when a worker cannot load the model or loads another, when a batch ends every
        worker it is given to, and when no node is left that could take one.
        """
        source = Source.of(name, weights, root)

        def execute(
            plan: Plan, jobs: Sequence[Job], images: Tensor, labels: Tensor, clean: Mapping[int, CleanRow]
        ) -> Iterator[tuple[Job, list[Row]]]:
            return self._execute(source, plan, jobs, images, labels, clean)

        return execute

    def _execute(
        self,
        source: Source,
        plan: Plan,
        jobs: Sequence[Job],
        images: Tensor,
        labels: Tensor,
        clean: Mapping[int, CleanRow],
    ) -> Iterator[tuple[Job, list[Row]]]:
        ray = _ray()
        options = {"num_cpus": self.threads, "num_gpus": GPU_SHARE if self.gpus else 0, "max_retries": RETRIES}
        task = ray.remote(_compute).options(**options)
        common = ray.put(_Common(source, plan.attacks, plan.model_digest, plan.seed, self.threads, _versions()))
        places = {repr(attack): place for place, attack in enumerate(plan.attacks)}
        waiting = iter(jobs)
        pending: dict[Any, Job] = {}
        idle_since = time.monotonic()
        while True:
            # Two batches for every place: none waits for this process, and none of a long plan piles up in memory.
            for _ in range(2 * max(1, self._places()) - len(pending)):
                job = next(waiting, None)
                if job is None:
                    break
                index = list(job.images)
                batch = images[index].numpy(), labels[index].numpy(), [clean[image] for image in index]
                pending[task.remote(common, places[repr(job.attack)], job.images, *batch)] = job
            if not pending:
                return
            finished, _ = ray.wait(list(pending), num_returns=1, timeout=POLL)
            for reference in finished:
                yield pending.pop(reference), self._rows(reference)
            if finished or self._places():
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > PATIENCE:
                raise InputError(
                    f"no node of the cluster has {self.threads} CPUs{' and a GPU' if self.gpus else ''} any more: "
                    "start nodes with 'ray start --address=…' and run the same command again; finished rows are kept"
                )

    def _places(self) -> int:
        """How many batches the nodes that are alive can take at once."""
        places = 0
        for node in _ray().nodes():
            if node["Alive"]:
                found = node["Resources"]
                room = found.get("CPU", 0) // self.threads
                places += int(min(room, found.get("GPU", 0) // GPU_SHARE) if self.gpus else room)
        return places

    def _rows(self, reference: Any) -> list[Row]:
        ray = _ray()
        try:
            rows: list[Row] = ray.get(reference)
            return rows
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, InputError):
                raise InputError(str(cause)) from None
            raise InputError(
                f"a worker of the cluster failed: {_last_line(cause)}; every node needs the absynth of this machine: "
                f"pip install 'absynth[cluster]=={__version__}'"
            ) from None
        except ray.exceptions.RayError as error:  # a worker, a node or its memory is gone, and retries did not help
            raise InputError(
                f"a batch ended every worker it was given to ({type(error).__name__}): give the nodes more memory, or "
                "run without --cluster to see what happens; finished rows are kept"
            ) from None


@contextmanager
def connect(address: str = "auto", *, models: Sequence[str] = (), threads: int | None = None) -> Iterator[Cluster]:
    """Connect to the Ray cluster at ``address`` (HOST:PORT) for the block. ``auto`` is the one that runs on this
    machine or that RAY_ADDRESS names; without one, all cores of this machine, for as long as the block lasts.

    ``models``: the modules of those given as ``package.module:factory`` are sent to the workers. ``threads`` of each
    batch (default: OMP_NUM_THREADS, or 1): what a process with as many threads computes is the same bit for bit, and
    within the block this process has as many, too. A batch gets a share of a GPU when the cluster has any.

    Raises InputError where Ray is missing, nothing answers at ``address``, or no node has ``threads`` CPUs.
    """
    place = _resolved(address)
    _stay_on_loopback(place)
    ray = _ray()
    if ray.is_initialized():
        raise InputError("this process is connected to a Ray cluster already: call ray.shutdown() first")
    threads = threads if threads is not None else _threads_wanted()
    modules = sorted({path for name in models if ":" in name and (path := _module_path(name)) is not None})
    before = torch.get_num_threads()
    options: dict[str, Any] = {
        "logging_level": logging.CRITICAL,
        "log_to_driver": False,
        "configure_logging": True,
        "runtime_env": {"py_modules": modules} if modules else None,
    }
    try:
        _open(ray, place, options)
        cluster = Cluster(threads, gpus=ray.cluster_resources().get("GPU", 0) >= GPU_SHARE)
        if not cluster._places():
            largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            raise InputError(
                f"a batch takes {threads} threads, the largest node of the cluster has {largest:g} CPUs: set "
                "OMP_NUM_THREADS=1"
            )
        torch.set_num_threads(threads)
        yield cluster
    finally:
        torch.set_num_threads(before)
        ray.shutdown()


def _open(ray: Any, address: str | None, options: dict[str, Any]) -> None:
    """Connect to the cluster at ``address``, or start one on this machine alone for None."""
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, object_store_memory=LOCAL_MEMORY, **options)
        else:
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "start Ray on this machine" if address is None else f"connect to the Ray cluster at {address}"
        raise InputError(
            f"cannot {where}: {_last_line(error)}; 'ray stop' and 'ray start --head' start afresh"
        ) from None


def _resolved(address: str) -> str | None:
    """The HOST:PORT where a cluster answers; None when ``auto`` finds none, and this machine alone must do.

    Raises InputError for an address where nothing answers. Asked before Ray, which itself would try for minutes.
    """
    if address != "auto":
        _knock(address)
        return address
    if named := os.environ.get("RAY_ADDRESS"):
        _knock(named)
        return named
    try:
        running = (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").read_text().strip()
        _knock(running)
    except (OSError, InputError):  # none was started here, or it has ended
        return None
    return running


def _stay_on_loopback(address: str | None) -> None:
    """Let Ray use 127.0.0.1 where everything is on this machine.

    It replaces that by the machine's address in the network otherwise, where a cluster bound to 127.0.0.1 does not
    answer and one started for this machine alone should not be seen. Ray reads the variable when it is imported.
    """
    if address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _knock(address: str) -> None:
    """Raises InputError unless something listens at HOST:PORT; Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"cluster address is {address!r}: expected auto, or HOST:PORT as 'ray start --head' prints it")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): start one with 'ray start --head' and "
            "give the address that it prints"
        ) from None


def _compute(
    common: _Common,
    attack: int,
    indices: tuple[int, ...],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    clean: list[CleanRow],
) -> list[Row]:
    """The rows of one batch; what a worker does."""
    if common.versions != (here := _versions()):
        raise InputError(f"a worker has {here}, this process {common.versions}: install the same on every node")
    torch.set_num_threads(common.threads)
    model = _model(common)
    # Tensors of this process's own making: memory that Ray lends is aligned in other ways, and read only.
    job = Job(_on_device(common.attacks[attack], model), indices)
    answers = {row.image: row for row in clean}
    return run_job(job, model, torch.tensor(images), torch.tensor(labels), answers, common.model, common.seed)


_loaded: dict[str, nn.Module] = {}  # by digest: a worker loads a model once


def _model(common: _Common) -> nn.Module:
    if common.model not in _loaded:
        model = common.source.load()
        if (digest := model_digest(model)) != common.model:
            raise InputError(
                f"a worker loaded {common.source.name!r} with digest {digest[:12]}, this process with "
                f"{common.model[:12]}: give every node the same files and data"
            )
        _loaded.clear()  # the model of an earlier run of this process
        _loaded[common.model] = model.to("cuda" if _ray().get_gpu_ids() and torch.cuda.is_available() else "cpu")
    return _loaded[common.model]


def _on_device(attack: Attack, model: nn.Module) -> Attack:
    """The attack, with the substitute model that a transfer attack brings moved to where the model is."""
    substitute = getattr(attack, "substitute", None)
    if isinstance(substitute, nn.Module):
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        moved: Any = replace(attack, substitute=substitute.to(device))  # type: ignore[type-var]
        return moved  # type: ignore[no-any-return]
    return attack


def _versions() -> str:
    return f"absynth {__version__}, PyTorch {torch.__version__}"


def _threads_wanted() -> int:
    text = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0].strip()
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"OMP_NUM_THREADS is {text!r}: expected a number from 1 up")
    return int(text)


def _module_path(name: str) -> str | None:
    """The file or folder of the top-level module of ``package.module:factory``; None where it is installed, since nodes
    then have it installed, too."""
    top = name.partition(":")[0].partition(".")[0]
    try:
        module = importlib.import_module(top)
    except Exception:
        return None  # `load_model` says what is wrong
    places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
    path = None if places[0] is None else Path(places[0]).resolve()
    installed = [Path(folder).resolve() for folder in (*map(sysconfig.get_path, ("purelib", "platlib", "stdlib")),)]
    if path is None or top in sys.stdlib_module_names or any(folder in path.parents for folder in installed):
        return None
    return str(path)


def _ray() -> Any:
    # Before the import, which reads them: nothing is reported to Ray's makers, and GPUs stay visible to tasks without.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as missing:
        raise InputError("a cluster needs Ray, which is not installed: pip install 'absynth[cluster]'") from missing
    return ray


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"
