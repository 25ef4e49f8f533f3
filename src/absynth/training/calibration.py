"""The numbers of ABS that are chosen on held-out images: alpha and eta of the posterior, gamma of Binary ABS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Calibration:
    """Of p(c|x) = (exp(-alpha E_c) + eta) / sum_k (exp(-alpha E_k) + eta), and its mean -log p(y|x) held out."""

    alpha: float
    eta: float
    cross_entropy: float


def calibrate(energies: Tensor, labels: Tensor, median_confidence: float = 0.9) -> Calibration:
    """alpha and eta for energies (N,K) and labels (N,) of held-out images.

    For every eta of a logarithmic grid, alpha is the largest one at which the median of the largest probability is
    ``median_confidence``; the pair of lowest cross-entropy is taken (paper, section 4 and appendix). With growing alpha
    the median first rises, as classes set themselves apart, then falls, as even good explanations sink below eta. On
    the rising side the same median says nothing of how well an image is explained: there, noise gets confident answers.
    """
    energies = energies.double()
    best: Calibration | None = None
    for exponent in torch.arange(-20, 0.01, 0.5, dtype=torch.float64).tolist():
        eta = 10.0**exponent
        alphas = torch.logspace(0, 4.5, 60, dtype=torch.float64)
        medians = torch.stack([_posterior(energies, float(alpha), eta).amax(1).median() for alpha in alphas])
        reached = (medians >= median_confidence).nonzero()
        if not len(reached) or reached[-1] == len(alphas) - 1:
            continue
        low, high = float(alphas[reached[-1]]), float(alphas[reached[-1] + 1])
        for _ in range(40):
            middle = (low + high) / 2
            enough = _posterior(energies, middle, eta).amax(1).median() >= median_confidence
            low, high = (middle, high) if enough else (low, middle)
        loss = F.nll_loss(_posterior(energies, low, eta).log(), labels).item()
        if best is None or loss < best.cross_entropy:
            best = Calibration(low, eta, loss)
    if best is None:  # classes that hardly differ: no alpha reaches the confidence; stay sharp and unrefusing
        alpha = 10.0 / float(energies.std().clamp(min=1e-9))
        posterior = _posterior(energies, alpha, 1e-12)
        best = Calibration(alpha, 1e-12, F.nll_loss(posterior.log(), labels).item())
    return best


def _posterior(energies: Tensor, alpha: float, eta: float) -> Tensor:
    evidence = torch.exp(-alpha * energies) + eta
    return evidence / evidence.sum(1, keepdim=True)


def refusal_threshold(probabilities: Tensor, share: float = 0.002) -> float:
    """The largest probability below which only ``share`` of held-out images (N,K) fall: those are called no digit."""
    confidence = probabilities.amax(1).double().sort().values
    classes = probabilities.shape[1]
    threshold = float(confidence[int(share * len(confidence))])
    return min(max(threshold, 1.5 / classes), 0.5)


def class_scales(energies: Tensor, labels: Tensor, rounds: int = 3, span: float = 0.12, steps: int = 49) -> Tensor:
    """Factors (K,) on the energies (N,K), the gamma of Binary ABS: a line search a class on the accuracy.

    Among factors of equal accuracy the one with the lowest cross-entropy of a softmax is taken, so that plateaus have
    an answer. Class 0 stays at 1: only ratios matter.
    """
    energies = energies.double()
    temperature = 1 / (energies.topk(2, largest=False).values.diff(dim=1).median() + 1e-12)
    scales = torch.ones(energies.shape[1], dtype=torch.float64)

    def score(candidate: Tensor) -> tuple[float, float]:
        scaled = -energies * candidate
        accuracy = (scaled.argmax(1) == labels).double().mean().item()
        return round(accuracy, 9), -F.cross_entropy(scaled * temperature, labels).item()

    best = score(scales)
    for _ in range(rounds):
        for number in range(1, len(scales)):
            for factor in torch.linspace(1 - span, 1 + span, steps).tolist():
                candidate = scales.clone()
                candidate[number] = factor
                if (found := score(candidate)) > best:
                    best, scales = found, candidate
    return scales.float()
