"""The same code on a GPU: answers, gradients, attacks, certificates, training. Skipped on a machine without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import absynth
from absynth import data, zoo
from absynth.attacks.base import Goal
from absynth.attacks.catalog import ATTACKS
from absynth.certificates import certified_radii
from absynth.evaluation import evaluate, verify
from absynth.training import recipes
from attack_models import images_near, prototypes
from test_attacks_exact import NAMES, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

SHIPPED = [name for name in zoo.names() if zoo.path_of(name).exists()]


@pytest.mark.parametrize("name", SHIPPED)
def test_answers_and_gradients_are_those_of_the_cpu(name: str, mnist_test: tuple[torch.Tensor, torch.Tensor]) -> None:
    images = mnist_test[0][:64]
    answers = {}
    for device in ("cpu", "cuda"):
        model = absynth.load(name, device=device)
        asked = images.to(device, copy=True).requires_grad_(True)
        logits = model(asked)
        logits.amax(1).sum().backward()
        assert logits.device.type == device and asked.grad is not None
        answers[device] = logits.detach().cpu(), asked.grad.cpu()
    here, there = answers["cpu"], answers["cuda"]
    assert torch.equal(here[0].argmax(1), there[0].argmax(1))
    best = here[0].amax(1)
    # energies of ABS are hundredths; logits of a network tens, and its convolutions keep ten bits of each number there
    allowed = 1e-4 if best.abs().max() < 1 else 2e-3 * float(best.abs().max())
    assert (best - there[0].amax(1)).abs().max() < allowed  # classes out of the running are not compared
    if "binary" not in name:
        assert (here[1] - there[1]).flatten(1).norm(dim=1).median() < 1e-3 * here[1].flatten(1).norm(dim=1).median()


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_finds_there_what_it_finds_here(name: str) -> None:
    model = prototypes()
    images, labels = images_near(model, 2)
    attack = small(ATTACKS[name], few=True)
    here = attack(model, images, Goal.untargeted(labels), torch.arange(2))
    model.prototypes = model.prototypes.cuda()
    goal = Goal.untargeted(labels.cuda())
    if hasattr(attack, "substitute"):
        attack = replace(attack, substitute=model)
    there = attack(model, images.cuda(), goal, torch.arange(2))
    assert there.images.device.type == "cuda"
    assert there.found.cpu().tolist() == here.found.tolist()
    if attack.deterministic and here.found.all():
        apart = [attack.norm.distance(one.images.cpu(), images) for one in (here, there)]
        assert torch.allclose(apart[0], apart[1], rtol=0.05)


def test_certificates_are_those_of_the_cpu(mnist_test: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = mnist_test[0][:4], mnist_test[1][:4]
    for name in ("prototype-abs", "saturating-prototype-abs"):
        here = certified_radii(absynth.load(name), images, labels)
        there = certified_radii(absynth.load(name, device="cuda"), images.cuda(), labels.cuda())
        for norm, radii in here.items():
            assert torch.allclose(radii, there[norm].cpu(), rtol=1e-5), norm


def test_an_evaluation_runs_there(tmp_path: Path, mnist_test: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = absynth.load("abs", device="cuda")
    suite = "fgm,boundary-projection-l2,transfer-l2"
    pictures = mnist_test[0][:3], mnist_test[1][:3]
    summary = evaluate(model, pictures, suite=suite, norms=["l2"], images=3, out=tmp_path, name="abs")
    assert summary.to_json()["models"]["abs"]["l2"]["images"] == 3
    assert verify(tmp_path, models={"abs": absynth.load("abs")}).holds


@pytest.mark.parametrize("name", ["cnn", "msd", "prototype-abs", "saturating-abs"])
def test_training_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = data.load("digits", "train")
    file = recipes.train(name, "digits", out=tmp_path, effort=0.01, device="cuda")
    assert file.exists() and len(images) == len(labels)
