"""Small classifiers for the tests of attacks, some with answers known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from absynth.norms import L0, L1, L2, LINF, Norm

SIDE = 8


@dataclass(frozen=True)
class Explained:
    energies: Tensor
    reconstructions: Tensor


class NearestPrototype:
    """One prototype a class, logits −‖x − p_c‖²: linear boundaries, and an analysis for the attacks that want one."""

    boxed = True  # as the project's own models: an attack that asks beyond the box gets an error instead of an answer

    def __init__(self, prototypes: Tensor) -> None:
        self.prototypes = prototypes  # (K,1,S,S)

    def __call__(self, images: Tensor) -> Tensor:
        assert not self.boxed or (images.min() >= 0 and images.max() <= 1), (float(images.min()), float(images.max()))
        return -(images.unsqueeze(1) - self.prototypes).square().flatten(2).sum(2)

    def analyze(self, images: Tensor) -> Explained:
        return Explained(-self(images), self.prototypes.expand(len(images), -1, -1, -1, -1))

    def exact(self, norm: Norm, image: Tensor, own: int, rivals: list[int]) -> float:
        """Distance of ``image`` (1,S,S) to the nearest boundary: closed form; L0 and L1 with the box, by sorts."""
        x = image.flatten().double().numpy()
        p = self.prototypes.flatten(1).double().numpy()
        return min(_to_halfspace(norm, x, p[own], p[rival]) for rival in rivals if rival != own)


def _to_halfspace(norm: Norm, x: np.ndarray, own: np.ndarray, rival: np.ndarray) -> float:
    w = 2 * (rival - own)  # moving along w raises the rival
    need = ((x - rival) ** 2).sum() - ((x - own) ** 2).sum()
    room = np.where(w > 0, 1 - x, x)
    if norm == L2:
        assert (need / (w @ w) * abs(w) <= room).all(), "the box would be active"
        return float(need / np.sqrt(w @ w))
    if norm == LINF:
        assert need / abs(w).sum() <= room.min(), "the box would be active"
        return float(need / abs(w).sum())
    if norm == L0:
        gains = np.sort(abs(w) * room)[::-1].cumsum()
        return float(np.searchsorted(gains, need) + 1)
    assert norm == L1
    total = 0.0
    for i in np.argsort(-abs(w)):
        step = min(room[i], need / abs(w[i]))
        total, need = total + step, need - step * abs(w[i])
        if need <= 1e-12:
            break
    return float(total)


def prototypes(classes: int = 4) -> NearestPrototype:
    """Random prototypes of middling gray; every two differ in many pixels by amounts within a factor of two."""
    generator = torch.Generator().manual_seed(3)
    sign = torch.randint(0, 2, (classes, 1, SIDE, SIDE), generator=generator) * 2 - 1
    size = 0.15 + 0.05 * torch.rand(classes, 1, SIDE, SIDE, generator=generator)
    return NearestPrototype(0.5 + sign * size)


def images_near(model: NearestPrototype, count: int) -> tuple[Tensor, Tensor]:
    """Images (B,1,S,S) of classes (B,), each a mixture of its prototype and the next class's."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(count) % len(model.prototypes)
    share = 0.25 + 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    rival = (labels + 1) % len(model.prototypes)
    noise = 0.02 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return (1 - share) * model.prototypes[labels] + share * model.prototypes[rival] + noise, labels


def unbreakable(images: Tensor) -> Tensor:
    """Class 0 whatever the image shows, with a gradient that is zero."""
    return torch.stack([images.flatten(1).sum(1) * 0 + 1, images.flatten(1).sum(1) * 0], dim=1)


class DigitsNetwork(torch.nn.Module):
    """A small fully connected network on the 8×8 digits that come with scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def trained_digits(seed: int = 0) -> tuple[DigitsNetwork, Tensor, Tensor]:
    """The network after a short training, and held-out images (B,1,8,8) with labels (B,) that it gets right."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DigitsNetwork()
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[300:]), labels[300:]).backward()
            optimizer.step()
    network.eval().requires_grad_(False)
    right = network(images[:300]).argmax(1) == labels[:300]
    return network, images[:300][right], labels[:300][right]
