"""Analyses and run ledgers as pandas data frames, for whatever reads Parquet or CSV. The only place that knows pandas.

frame = analyses_frame(model.analyze(images), labels=labels)
save(frame, "analyses.parquet")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from absynth.classifiers import Analysis
from absynth.errors import InputError
from absynth.evaluation.folders import ledger_folders
from absynth.evaluation.ledger import Ledger

if TYPE_CHECKING:
    from pandas import DataFrame as Frame


def analyses_frame(
    analysis: Analysis, labels: Tensor | None = None, indices: Sequence[int] | None = None, *, pixels: bool = False
) -> Frame:
    """How every class explains B images: B·K rows, image by image, class by class.

    Columns: ``image`` (from ``indices``, or 0 to B-1), ``label`` (with ``labels`` (B,)), ``class``, ``energy``,
    ``probability``, ``latent_0`` to ``latent_D-1``, and with ``pixels`` ``reconstruction``, a flat list of C·S·S values
    in (0,1), row by row. Raises InputError when pandas is missing, or labels or indices do not fit.
    """
    pandas = _pandas()
    count, classes = analysis.energies.shape
    for what, given in {"labels": labels, "indices": indices}.items():
        if given is not None and len(given) != count:
            raise InputError(f"{len(given)} {what} for {count} analyzed images: give one per image")
    columns: dict[str, Any] = {"image": _repeated(range(count) if indices is None else indices, classes)}
    if labels is not None:
        columns["label"] = _repeated(labels.tolist(), classes)
    columns["class"] = list(range(classes)) * count
    columns["energy"] = analysis.energies.detach().cpu().flatten().numpy()
    columns["probability"] = analysis.probabilities.detach().cpu().flatten().numpy()
    latents = analysis.latents.detach().cpu().flatten(0, 1)  # (B*K,D)
    columns |= {f"latent_{place}": latents[:, place].numpy() for place in range(latents.shape[1])}
    if pixels:
        columns["reconstruction"] = list(analysis.reconstructions.detach().cpu().flatten(0, 1).flatten(1).numpy())
    return pandas.DataFrame(columns)


def rows_frame(*folders: str | Path) -> Frame:
    """The attack rows of the runs in or below ``folders``, a line each, without the adversarial images.

    Columns: ``model`` (its name), ``digest``, ``attack`` (its name), ``parameters``, ``norm``, ``image``, ``seed``,
    ``label``, ``distance`` (infinite where nothing was found), ``status``, ``forward``, ``backward``, ``seconds``.
    Raises InputError when pandas is missing or a run cannot be read.
    """
    pandas = _pandas()
    numbers = ("image", "seed", "label", "distance", "status", "forward", "backward", "seconds")
    lines = []
    for folder in ledger_folders(folders):
        with Ledger(folder) as ledger:
            attacks = ledger.attacks()
            for record in ledger.models():
                for row in ledger.rows(record.digest, images=False):
                    line = {"model": record.name, "digest": row.model, "attack": attacks[row.attack].name}
                    line |= {"parameters": row.attack, "norm": row.norm}
                    lines.append(line | {key: getattr(row, key) for key in numbers})
    return pandas.DataFrame(lines, columns=["model", "digest", "attack", "parameters", "norm", *numbers])


def save(frame: Frame, path: str | Path) -> Path:
    """Write a frame as Parquet or CSV, as the ending of ``path`` says.

    Raises InputError for any other ending, where pyarrow is missing, and for a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"cannot write {path.name}: the name must end in .parquet or .csv")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, engine="pyarrow", index=False)
    except ImportError as missing:
        raise _missing("Parquet needs pyarrow") from missing
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder") from error
    return path


def _repeated(values: Any, times: int) -> list[int]:
    """Each value ``times`` times: [a, b] -> [a, a, b, b] for 2."""
    return [int(value) for value in values for _ in range(times)]


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as missing:
        raise _missing("data frames need pandas") from missing
    return pandas


def _missing(what: str) -> InputError:
    return InputError(f"{what}, which is not installed: pip install 'absynth[export]'")
