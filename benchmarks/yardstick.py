"""The yardstick: ABS by the paper's schedule, written plainly in PyTorch.

8,000 prior candidates a class, 50 steps of Adam with learning rate 0.05 and the latents kept in the ball of radius 5,
ten decoders of ``conv_transpose2d``, all classes to the end, batches as given. Nothing here is tuned, and nothing here
is used by the library: it is what its speed is measured against, on the same weights and the same machine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.candidates import prior_candidates
from absynth.vae import Decoder


class Yardstick(nn.Module):
    """Images (B,1,28,28) -> logits (B,10) = minus the energies, normalized by the number of pixels.

    Its gradient is that of the energies at the latents found, the exact one at a minimum: attacks can use it.
    """

    def __init__(self, decoders: Iterable[Decoder], steps: int = 50, candidates: int = 8000) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self.steps = steps
        self.latents = prior_candidates(candidates)
        with torch.no_grad():
            self.points = [
                torch.cat([decoded(decoder, chunk).flatten(1) for chunk in self.latents.split(1000)])
                for decoder in self.decoders
            ]

    def forward(self, images: Tensor) -> Tensor:
        pixels = images[0].numel()
        energies = []
        for decoder, points in zip(self.decoders, self.points, strict=True):
            seen = images.detach()
            flat = seen.flatten(1)
            costs = points.square().sum(1) + self.latents.square().sum(1) / 2
            start = (costs - 2 * flat @ points.T).argmin(1)
            latents = self.latents[start].clone().requires_grad_(True)
            optimizer = torch.optim.Adam([latents], lr=0.05)
            for _ in range(self.steps):
                optimizer.zero_grad()
                with torch.enable_grad():
                    torch.autograd.backward(self._energy(decoder, latents, seen).sum() / pixels)
                optimizer.step()
                with torch.no_grad():
                    norms = latents.norm(dim=1, keepdim=True)
                    latents.mul_(torch.clamp(5 / norms, max=1))
            energies.append(self._energy(decoder, latents.detach(), images))
        return -torch.stack(energies, dim=1) / pixels

    @staticmethod
    def _energy(decoder: Decoder, latents: Tensor, images: Tensor) -> Tensor:
        squared_error = (images - decoded(decoder, latents)).square().flatten(1).sum(1)
        energy: Tensor = squared_error + latents.square().sum(1) / 2
        return energy


def decoded(decoder: Decoder, latents: Tensor) -> Tensor:
    """Latents (B,D) -> images (B,C,S,S) by the decoder's layers as they are: its own forward pass is tuned."""
    hidden = F.elu(decoder.bn_0(decoder.conv_0(latents[:, :, None, None])))
    hidden = F.elu(decoder.bn_1(decoder.conv_1(hidden)))
    hidden = F.elu(decoder.bn_2(decoder.conv_2(hidden)))
    images: Tensor = torch.sigmoid(decoder.conv_3(hidden))
    return images
