"""The tour: every model on real test images, noise that only ABS refuses, a page that shows an analysis, and a small
evaluation under attack."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import torch
from torch import Tensor, nn

from absynth import data, zoo
from absynth.classifiers import ABS, Calibrated
from absynth.clean import Clean, answers, measure
from absynth.errors import InputError
from absynth.evaluation import Summary, report
from absynth.inventory import check_writable, describe_model, label_names, problems
from absynth.reproduction import evaluate_models, what_is_kept

Report = Callable[[int, int, str], None]  # (steps done, steps in all, a line to show)
Bar = Callable[[str], AbstractContextManager[Report]]  # a title -> a progress bar

ATTACKED = ("abs", "binary-abs", "cnn", "madry")  # the four that the paper compares

# Of the training steps of the shipped models: enough for 1,100 small digits, in about two minutes on two cores.
SMALL_EFFORT = {
    "abs": 0.06,
    "binary-abs": 0.06,
    "cnn": 1.0,
    "binary-cnn": 1.0,
    "transfer-cnn": 1.0,
    "madry": 0.5,
    "prototype-abs": 0.1,
    "nearest-neighbor": 1.0,
}


@dataclass(frozen=True)
class Noise:
    """A model's answers to images without a digit: median of the largest probability, and the share it refuses."""

    confidence: float
    refused: float | None


@dataclass(frozen=True)
class Tour:
    """What the quickstart found, by model; ``shuffled``: digits with their pixels shuffled. ``attacked`` and its
    ``report`` are None when no attack was asked for."""

    dataset: str
    images: int
    clean: dict[str, Clean]
    noise: dict[str, Noise]
    shuffled: dict[str, Noise]
    page: Path
    attacked: Summary | None
    report: Path | None


def run(
    out: str | Path = "quickstart",
    *,
    images: int = 300,
    noise_images: int = 100,
    attacked: int = 20,
    root: str | Path | None = None,
    bar: Bar,
    say: Callable[[str], None],
) -> Tour:
    """Measure every model at hand and write ``index.html`` and its figures into the folder ``out``.

    On MNIST with the shipped weights; where either is missing and cannot be downloaded, on the embedded digits, with
    small models trained on them and kept in ``out``. Then the suite "quick" on the first ``attacked`` test images (0:
    no attack), in L0, L2 and L-infinity, into a run folder in ``out`` with its report. ``bar`` makes progress bars,
    ``say`` is told what happens. Raises InputError if ``out`` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    dataset, weights = _choose(out, root, bar, say)
    pictures, labels = data.load(dataset, "test", root)
    described = [describe_model(name, folder=weights, root=root) for name in zoo.names()]
    for line in problems(described):
        say(f"left out {line}")
    models = {one.name: zoo.load(one.name, folder=weights, root=root) for one in described if one.problem is None}
    images = min(images, len(pictures))
    noise_images = min(noise_images, len(pictures))
    blank, shuffled = without_digits(pictures[:noise_images])
    clean, on_noise, on_shuffled = {}, {}, {}
    with bar("classifying") as tell:
        for number, (name, model) in enumerate(models.items()):
            tell(number, len(models), name)
            clean[name] = measure(model, pictures[:images], labels[:images])
            on_noise[name], on_shuffled[name] = _answers(model, blank), _answers(model, shuffled)
        tell(len(models), len(models), "")
    explainer = models["abs"]
    assert isinstance(explainer, ABS)
    names = label_names(dataset, len(explainer.decoders))
    shown = _first_right(explainer, pictures, labels)
    _explain(explainer, pictures[shown], names, out / "digit")
    refused = _explain(explainer, shuffled[0], names, out / "shuffled")
    summary, written = None, None
    if attacked:
        digests = "".join(str(one.digest) for one in described if one.name in ATTACKED)
        # of its own for other weights: a run is about the models it began with
        folder = out / f"run-{dataset}-{hashlib.sha256(digests.encode()).hexdigest()[:8]}"
        if line := what_is_kept(folder):
            say(line)
        with bar("attacking") as tell:
            summary = evaluate_models(
                [name for name in ATTACKED if name in models], dataset, suite="quick", images=attacked, out=folder,
                weights=weights, root=root, progress=tell, probe=False,  # the questions would double a newcomer's wait
            )  # fmt: skip
        written = report(folder).html
    tour = Tour(dataset, images, clean, on_noise, on_shuffled, out / "index.html", summary, written)
    tour.page.write_text(_page(tour, noise_images, refused), encoding="utf-8")
    return tour


def without_digits(images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Uniform noise of the shape of ``images`` (N,C,S,S); and these with their pixels shuffled, each in its own way."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator)
    flat = images.flatten(1)  # (N,P)
    order = torch.rand(flat.shape, generator=generator).argsort(1)
    return noise, flat.gather(1, order).view_as(images)


def _choose(out: Path, root: str | Path | None, bar: Bar, say: Callable[[str], None]) -> tuple[str, Path | None]:
    """The data set and the folder of weights: MNIST and the shipped ones, or digits and freshly trained ones."""
    try:
        if not zoo.path_of("abs").exists():
            raise InputError("the package has no shipped weights")
        data.load("mnist", "test", root)
        return "mnist", None
    except InputError as error:
        say(f"falling back to the embedded digits, training small models on them ({error})")
    from absynth.training.recipes import train  # here: only this branch trains

    weights = out / "weights"
    for name, effort in SMALL_EFFORT.items():  # the other models would take longer than a newcomer waits
        if describe_model(name, folder=weights).file is None:
            with bar(f"training {name}") as report:
                train(name, "digits", out=weights, effort=effort, progress=report)
    return "digits", weights


def _answers(model: nn.Module, images: Tensor) -> Noise:
    found = torch.cat([answers(model, chunk)[1] for chunk in images.split(64)])
    refused = model.refuses(found).double().mean().item() if isinstance(model, Calibrated) else None
    return Noise(found.amax(1).median().item(), refused)


def _first_right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """The first of 20 test images that the model gets right; the first if there is none."""
    right = (answers(model, images[:20])[0] == labels[:20]).nonzero()
    return int(right[0]) if len(right) else 0


def _explain(model: ABS, image: Tensor, names: tuple[str, ...], stem: Path) -> bool:
    """Draw the light and the dark figure; whether the model refuses the image."""
    from absynth.figures import explanation  # here: matplotlib takes a second to import

    analysis = model.analyze(image[None])
    refused = bool(model.refuses(analysis.probabilities))
    for suffix, dark in (("light", False), ("dark", True)):
        explanation(image, analysis, names, stem.with_name(f"{stem.name}-{suffix}.png"), refused=refused, dark=dark)
    return refused


def _page(tour: Tour, noise_images: int, refused: bool) -> str:
    """The page: one file, no scripts, figures inside."""
    rows = []
    for name, clean in tour.clean.items():
        low, high = clean.interval
        cells = (
            f"<th scope=row>{html.escape(name)}<small>{html.escape(zoo.DESCRIPTIONS[name])}</small></th>",
            f"<td>{100 * clean.clean_accuracy:.1f} %<small>{100 * low:.1f} – {100 * high:.1f}</small></td>",
            f"<td>{clean.median_confidence:.2f}</td>",
            *(_noise_cell(one[name]) for one in (tour.noise, tour.shuffled)),
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    template = Template((files("absynth") / "templates" / "quickstart.html").read_text(encoding="utf-8"))
    return template.substitute(
        dataset="MNIST" if tour.dataset == "mnist" else "the embedded digits",
        images=tour.images,
        noise_images=noise_images,
        verdict="no class explains it, and ABS says so" if refused else "ABS still names a class",
        rows="\n".join(rows),
        attacked=_link(tour),
        **{
            f"{figure}_{shade}": base64.b64encode(tour.page.with_name(f"{figure}-{shade}.png").read_bytes()).decode()
            for figure in ("digit", "shuffled")
            for shade in ("light", "dark")
        },
    )


def _link(tour: Tour) -> str:
    """Where the page tells of the attacks; nothing where there were none."""
    if tour.report is None:
        return ""
    place = html.escape(tour.report.relative_to(tour.page.parent).as_posix())
    return (
        f'<h2>Under attack</h2>\n<p><a href="{place}">The report</a>: four models, one attack a norm, what it found. '
        "Every figure there is an upper bound; more and other attacks find nearer adversarials.</p>\n"
    )


def _noise_cell(noise: Noise) -> str:
    refused = "cannot refuse" if noise.refused is None else f"refuses {100 * noise.refused:.0f} %"
    kind = "sure" if noise.confidence >= 0.5 else "unsure"
    return f"<td class={kind}>{noise.confidence:.2f}<small>{refused}</small></td>"
