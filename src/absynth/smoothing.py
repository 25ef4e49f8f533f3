"""A classifier that votes over noisy copies of the image (Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from absynth.checks import check_images
from absynth.decoding import whole_precision
from absynth.errors import InputError

AT_ONCE = 512  # noisy images a batch: bounds the memory


class Smoothed(nn.Module):
    """The class that ``classifier`` names most often among ``samples`` copies of the image with Gaussian noise.

    Images (B,C,S,S) in [0,1] -> logits (B,K): the logarithm of each class's share of the votes, half a vote added to
    each, so that equal votes are equal logits. Noise of deviation ``sigma`` is added and the copies cut to [0,1]. A
    pure function of each image: its noise is drawn from a generator seeded by the image's own bytes. Votes have no
    gradient; autograd is given that of the mean probability in their place. Raises InputError for other images and for
    a sigma that is not positive.
    """

    def __init__(self, classifier: nn.Module, sigma: float = 0.5, samples: int = 100) -> None:
        super().__init__()
        if not sigma > 0 or samples < 1:
            raise InputError(f"sigma is {sigma}, samples {samples}: sigma must be positive, samples at least 1")
        self.classifier, self.sigma, self.samples = classifier, sigma, samples

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, channels=images.shape[1] if images.ndim == 4 else 1, size=None)
        count = max(1, AT_ONCE // self.samples)
        return torch.cat([self._vote(chunk) for chunk in images.split(count)])

    def _vote(self, images: Tensor) -> Tensor:
        noise = torch.stack([self._noise(image) for image in images.detach()])  # (B,samples,C,S,S)
        noisy = (images.unsqueeze(1) + noise).clamp(0, 1).flatten(0, 1)
        with whole_precision(noisy):  # a vote that rounding decides would not be the same on every device
            answers = self.classifier(noisy)
        answers = answers.unflatten(0, (len(images), self.samples))  # (B,samples,K)
        votes = torch.nn.functional.one_hot(answers.argmax(2), answers.shape[2]).to(images.dtype).sum(1)
        if images.requires_grad:
            soft = answers.softmax(2).sum(1)
            votes = votes + (soft - soft.detach())  # the difference is exactly 0 and has the gradient
        shares: Tensor = ((votes + 0.5) / (self.samples + 0.5 * answers.shape[2])).log()
        return shares

    def _noise(self, image: Tensor) -> Tensor:
        """Noise (samples,C,S,S) that depends on the image (C,S,S) alone."""
        digest = hashlib.sha256((image.cpu() + 0.0).contiguous().numpy().tobytes()).digest()  # no -0.0
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return self.sigma * torch.randn(self.samples, *image.shape, generator=generator).to(image.device)
