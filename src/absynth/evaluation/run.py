"""Carrying out a plan: every job's rows are computed, judged and written down before the next one starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from absynth import data as datasets
from absynth.attacks.base import Attack, Classifier
from absynth.errors import InputError
from absynth.evaluation import doubts as doubting
from absynth.evaluation.jobs import clean_rows, run_job
from absynth.evaluation.judge import TOLERANCE, ask, device_of
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.plan import Job, Plan, choose_attacks, image_indices, load_model, model_digest
from absynth.evaluation.rows import AttackRecord, CleanRow, ModelRecord, Row
from absynth.evaluation.summary import Summary, summarize

CLEAN_BATCH = 256
ASKED_AGAIN = 32  # images whose stored answers are compared with the model's when a run goes on
NORMS = ("l0", "l2", "linf")

#: What computes jobs: (plan, jobs, the split's images (N,C,H,W) and labels (N,), clean answers by image) -> each job
#: with its rows, in any order, as it is finished. ``here`` is one, ``absynth.distributed`` has another.
Executor = Callable[[Plan, Sequence[Job], Tensor, Tensor, Mapping[int, CleanRow]], Iterator[tuple[Job, list[Row]]]]


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is: steps ``done`` of ``total``, what was done last, and the seconds left at this pace.

    A step is a row. Where the attacks are put to the test afterwards, each test counts as many as images it is made on.
    """

    done: int
    total: int
    attack: str
    seconds_left: float | None


def evaluate(
    model: str | nn.Module,
    data: str | Path | tuple[Tensor, Tensor] = "mnist",
    split: str = "test",
    suite: str | Iterable[Attack] = "quick",
    norms: Sequence[str] = NORMS,
    images: int | Sequence[int] = 100,
    out: str | Path = "runs/evaluation",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    *,
    name: str | None = None,
    root: str | Path | None = None,
    batch_size: int | None = None,
    probe: bool = True,
    retry_errors: bool = False,
    executor: Executor | None = None,
) -> Summary:
    """Attack a model and write every row into the ledger of the run folder ``out``; what has a row is not done again.

    ``model`` is a name of the zoo, ``package.module:factory`` or a module in eval mode (give it a ``name``). ``data``
    is a data set's name or folder, or (images (N,C,H,W) float32 in [0,1], labels (N,)). ``suite`` is a suite's or
    attack's name, several separated by commas, ``"none"``, or attacks. ``images`` is how many of the split's first, or
    their indices. ``probe`` puts the questions of ``absynth.evaluation.doubts`` to model and attacks. ``retry_errors``
    tries again what of these images and attacks an earlier run marked as an error. ``executor`` computes the batches
    (default: this process); ``absynth.distributed.connect`` gives one that does so on a cluster. ``batch_size``: images
    attacked at once, and written at once; None: 32, on a GPU 256.

    Interrupted at any instant, it loses at most the batch in flight; called again, it goes on. Models or attacks that
    fail give rows with status ``error`` and the rest goes on. Raises InputError for bad input and for a folder that
    holds another model's, data set's or seed's evaluation.
    """
    label = name or (model if isinstance(model, str) else type(model).__name__)
    classifier = load_model(model) if isinstance(model, str) else model
    loaded = load_split(data, split, root)
    plan = make_plan(classifier, label, loaded, suite, norms, images, seed, batch_size)
    pictures, labels = loaded[:2]
    with Ledger(out, write=True) as ledger:
        run(
            plan, classifier, pictures, labels, ledger, progress=progress, probe=probe, retry_errors=retry_errors,
            executor=executor,
        )  # fmt: skip
    return summarize(out)


def make_plan(
    classifier: nn.Module,
    name: str,
    loaded: tuple[Tensor, Tensor, str, str],
    suite: str | Iterable[Attack],
    norms: Sequence[str],
    images: int | Sequence[int],
    seed: int = 0,
    batch_size: int | None = None,
) -> Plan:
    """What ``evaluate`` does with these arguments, on what ``load_split`` returned. Raises InputError where they do
    not fit."""
    pictures, labels, data, split = loaded
    return Plan(
        model=name,
        model_digest=model_digest(classifier),
        attacks=choose_attacks(suite, norms, classifier),
        images=image_indices(images, len(pictures)),
        data=data,
        split=split,
        data_digest=datasets.digest(pictures, labels),
        seed=seed,
        batch_size=(256 if device_of(classifier).type == "cuda" else 32) if batch_size is None else batch_size,
    )


def run(
    plan: Plan,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    ledger: Ledger,
    *,
    progress: Callable[[Progress], None] | None = None,
    probe: bool = True,
    retry_errors: bool = False,
    executor: Executor | None = None,
) -> None:
    """Carry out ``plan`` on the split's ``images`` (N,C,H,W) and ``labels`` (N,), as far as ``ledger`` does not have
    it; with ``retry_errors``, as far as it has no more of it than an error, which stays until it is replaced."""
    check_run(plan, ledger)
    prepare(plan, classifier, images, labels, ledger, retry_errors=retry_errors)
    clean = {row.image: row for row in ledger.clean(plan.model_digest)}
    if probe:
        if retry_errors:
            ledger.forget_failed_probe(plan.model_digest)
        doubting.probe_model(plan, classifier, images, labels, ledger)
    jobs = plan.jobs(ledger.keys(plan.model_digest, errors=not retry_errors))
    rows_in_all, test = len(plan.attacks) * len(plan.images), min(doubting.HALVED, len(plan.images))
    total = rows_in_all + (len(plan.attacks) * test if probe else 0)
    done = rows_in_all - sum(len(job.images) for job in jobs)
    started, before = time.monotonic(), done

    def tell(steps: int, what: str) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            pace = (time.monotonic() - started) / (done - before)
            progress(Progress(done, total, what, pace * (total - done)))

    for job, rows in (executor or here(classifier))(plan, jobs, images, labels, clean):
        ledger.add_rows(rows)
        tell(len(job.images), _listed_name(job.attack))
    if probe:
        doubting.probe_attacks(
            plan, classifier, images, labels, ledger, lambda attack: tell(test, f"testing {_listed_name(attack)}")
        )


def here(classifier: Classifier) -> Executor:
    """The executor that computes jobs one after the other in this process."""

    def execute(
        plan: Plan, jobs: Sequence[Job], images: Tensor, labels: Tensor, clean: Mapping[int, CleanRow]
    ) -> Iterator[tuple[Job, list[Row]]]:
        for job in jobs:
            index = list(job.images)
            yield job, run_job(job, classifier, images[index], labels[index], clean, plan.model_digest, plan.seed)

    return execute


def check_run(plan: Plan, ledger: Ledger) -> None:
    """Raises InputError when the ledger holds another model, other data or another seed than the plan, or another
    attack under the repr of one of the plan's."""
    ledger.check_facts(**_facts(plan))
    known = {record.digest: record.name for record in ledger.models()}
    if known and plan.model_digest not in known:
        names = ", ".join(sorted(known.values()))
        raise InputError(
            f"{ledger.folder} holds the evaluation of another model ({names}, digest {min(known)[:12]}; this one is "
            f"{plan.model}, {plan.model_digest[:12]}): give another output folder"
        )
    stored = ledger.attacks()
    for record in map(_attack_record, plan.attacks):
        other = stored.get(record.attack, record)
        if (other.name, other.norm) != (record.name, record.norm):
            raise InputError(
                f"{ledger.folder} holds {other.name} in {other.norm} as {record.attack[:80]}, which {record.name} in "
                f"{record.norm} is as well: let the repr show what tells them apart, no field of it with repr=False, "
                "and give another output folder"
            )
    seeds = {seed for *_, seed in ledger.keys(plan.model_digest)} - {plan.seed}
    if seeds and plan.attacks:
        raise InputError(
            f"{ledger.folder} holds rows of seed {min(seeds)}, this plan has seed {plan.seed}: give another "
            "output folder, "
            "and merge the two afterwards"
        )


def prepare(
    plan: Plan,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    ledger: Ledger,
    *,
    retry_errors: bool = False,
) -> None:
    """Write down data, attacks, images, model and the model's clean answers, unusable ones anew with ``retry_errors``.

    Raises InputError for labels out of range and as ``check_answers`` does, as a rule before anything is written: only
    a model that answers none of the first images may say later how many classes it has.
    """
    check_answers(plan, classifier, images, ledger)
    answers = ledger.clean(plan.model_digest)
    known = {answer.image for answer in answers if answer.logits is not None or not retry_errors}
    todo = [image for image in plan.images if image not in known]
    classes = max((one.classes for one in ledger.models() if one.digest == plan.model_digest), default=0)
    check_labels(todo, labels, classes)
    for start in range(0, len(todo), CLEAN_BATCH):
        batch = todo[start : start + CLEAN_BATCH]
        rows = clean_rows(classifier, batch, images[batch], labels[batch], plan.model_digest)
        classes = max((len(row.logits) for row in rows if row.logits is not None), default=classes)
        check_labels(todo[start:], labels, classes)
        ledger.describe(**_facts(plan))
        ledger.add_images(batch, images[batch], labels[batch].tolist())
        ledger.add_models([ModelRecord(plan.model_digest, plan.model, classes)])
        ledger.add_clean(rows)
    ledger.add_attacks(_attack_record(attack) for attack in plan.attacks)


def check_labels(indices: Sequence[int], labels: Tensor, classes: int) -> None:
    """Raises InputError where a label (N,) of the images ``indices`` is not one of the ``classes``, 0 for not known."""
    of_these = labels[list(indices)]
    wrong = ((of_these < 0) | (of_these >= classes if classes else False)).nonzero().flatten().tolist()
    if wrong:
        raise InputError(
            f"image {indices[wrong[0]]} has label {int(of_these[wrong[0]])}, the model has {classes or 'no'} classes "
            "numbered from 0: give the data set the model was made for"
        )


def check_answers(plan: Plan, classifier: Classifier, images: Tensor, ledger: Ledger) -> None:
    """Raise InputError when a steady model says of images of the ledger something else than it did when they were
    written down: the weights are the same, so its code has changed."""
    stored = {row.image: row.logits for row in ledger.clean(plan.model_digest) if row.logits is not None}
    asked = [image for image in plan.images if image in stored][:ASKED_AGAIN]
    if not asked:
        return
    try:
        answer = ask(classifier, images[asked].to(device_of(classifier)))
    except Exception:  # a model that fails now: its rows will say so
        return
    for image, logits, error in zip(asked, answer.logits.cpu(), answer.errors, strict=True):
        before = stored[image]
        if not error and not _same(before, logits):
            raise InputError(
                f"{ledger.folder} holds rows of {plan.model} from when it answered otherwise (image {image}: then "
                f"{int(before.argmax())}, now {int(logits.argmax())}, other logits): its weights are the same, so its "
                "code has changed; give another output folder"
            )


def _same(before: Tensor, now: Tensor) -> bool:
    """Whether two answers (K,) agree about the two classes that were likeliest, as far as rounding lets them."""
    best, spread = before.topk(2).indices, float(before.max() - before.min())
    return before.shape == now.shape and float((before - now)[best].abs().max()) <= TOLERANCE * max(spread, 1e-12)


def load_split(
    data: str | Path | tuple[Tensor, Tensor], split: str, root: str | Path | None
) -> tuple[Tensor, Tensor, str, str]:
    """Images, labels, the name of the data and of the split. Raises InputError for tensors that do not fit."""
    if not isinstance(data, tuple):
        pictures, labels = datasets.load(data, split, root)
        return pictures, labels, str(data), split
    pictures, labels = data
    if pictures.ndim != 4 or pictures.dtype != torch.float32 or not ((pictures >= 0) & (pictures <= 1)).all():
        raise InputError(
            f"images are {pictures.dtype} {tuple(pictures.shape)}; expected float32 (N,C,H,W) with values in [0,1]: "
            "divide by 255 or clip"
        )
    if labels.shape != pictures.shape[:1] or labels.is_floating_point():
        raise InputError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected {len(pictures)} integers")
    return pictures, labels.long(), "tensors", "all"


def _facts(plan: Plan) -> dict[str, str]:
    return {"data": plan.data, "split": plan.split, "data_digest": plan.data_digest}


def _listed_name(attack: Attack) -> str:
    """An attack and its form refined for thresholded inputs are one line of a table: the repr keeps them apart."""
    return attack.name.replace("-refined", "")


def _attack_record(attack: Attack) -> AttackRecord:
    return AttackRecord(repr(attack), _listed_name(attack), str(attack.norm), attack.knowledge, attack.kind)
