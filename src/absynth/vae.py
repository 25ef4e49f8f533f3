"""The generative model of one class: encoder, decoder and the loss, spelled out layer by layer.

Shapes: B images, C channels, S pixels a side, D latents. The paper's size is C = 1, S = 28, D = 8.
Source: Schott et al. 2019 (arXiv 1805.09190), appendix, and the layer sizes of the authors' released code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_SIZE = 8


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of one class's variational autoencoder.

    ``image_size`` is the side of the square image in pixels; the decoder's strides reach 16, 20, 24, 28, 32, ...
    """

    image_size: int = 28
    channels: int = 1
    latent_size: int = LATENT_SIZE

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 4:
            raise ValueError(
                f"image_size is {self.image_size}; the decoder makes sides of 16 pixels or more that divide by 4: "
                "resize the images"
            )
        if self.channels < 1 or self.latent_size < 1:
            raise ValueError(f"channels and latent_size must be at least 1, not {self.channels} and {self.latent_size}")

    @property
    def base_size(self) -> int:
        """Side of the decoder's first feature map: 4 for 28 pixels."""
        return (self.image_size - 12) // 4


class Encoder(nn.Module):
    """Images (B,C,S,S) in [0,1] -> mean (B,D) and log-variance (B,D) of q(z|x). Used in training only."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        side = config.image_size - 4  # after kernel 5, stride 1
        side = (side - 4) // 2 + 1  # kernel 4, stride 2
        side = (side - 3) // 2 + 1  # kernel 3, stride 2
        self.conv_0 = nn.Conv2d(config.channels, 32, 5)
        self.bn_0 = nn.BatchNorm2d(32)
        self.conv_1 = nn.Conv2d(32, 32, 4, stride=2)
        self.bn_1 = nn.BatchNorm2d(32)
        self.conv_2 = nn.Conv2d(32, 64, 3, stride=2)
        self.bn_2 = nn.BatchNorm2d(64)
        self.conv_3 = nn.Conv2d(64, 2 * config.latent_size, side)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.elu(self.bn_0(self.conv_0(images)))
        hidden = F.elu(self.bn_1(self.conv_1(hidden)))
        hidden = F.elu(self.bn_2(self.conv_2(hidden)))
        moments = self.conv_3(hidden).flatten(1)  # (B,2D,1,1) -> (B,2D)
        mean, log_variance = moments.chunk(2, dim=1)  # 2 x (B,D)
        return mean, log_variance


class Decoder(nn.Module):
    """Latents (B,D) -> the mean image (B,C,S,S) in (0,1): the G_c of the paper."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv_0 = nn.ConvTranspose2d(config.latent_size, 32, config.base_size)
        self.bn_0 = nn.BatchNorm2d(32)
        self.conv_1 = nn.ConvTranspose2d(32, 16, 5, stride=2)
        self.bn_1 = nn.BatchNorm2d(16)
        self.conv_2 = nn.ConvTranspose2d(16, 16, 5, stride=2)
        self.bn_2 = nn.BatchNorm2d(16)
        self.conv_3 = nn.ConvTranspose2d(16, config.channels, 4)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = latents[:, :, None, None]  # (B,D) -> (B,D,1,1)
        hidden = F.elu(self.bn_0(self.conv_0(hidden)))  # (B,32,4,4)
        hidden = F.elu(self.bn_1(_transposed(self.conv_1, hidden)))  # (B,16,11,11)
        hidden = F.elu(self.bn_2(_transposed(self.conv_2, hidden)))  # (B,16,25,25)
        images: Tensor = torch.sigmoid(self.conv_3(hidden))  # (B,C,28,28)
        return images


def _transposed(layer: nn.ConvTranspose2d, maps: Tensor) -> Tensor:
    """``layer(maps)``: with the bias inside, a stride-2 transposed convolution takes twice as long on a CPU."""
    assert layer.bias is not None
    return F.conv_transpose2d(maps, layer.weight, stride=layer.stride).add_(layer.bias[:, None, None])


class VAE(nn.Module):
    """Encoder and decoder of one class."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B,C,S,S) -> reconstructions (B,C,S,S) of a sample of q(z|x), its mean (B,D), log-variance (B,D)."""
        mean, log_variance = self.encoder(images)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.decoder(mean + noise * torch.exp(0.5 * log_variance)), mean, log_variance


def negative_elbo(
    images: Tensor, reconstructions: Tensor, mean: Tensor, log_variance: Tensor, beta: float = 1.0
) -> Tensor:
    """Squared error + beta * KL(q || N(0, I)), summed over pixels and latents, averaged over the batch: a scalar.

    The squared error is -log p(x|z) up to a constant for a Gaussian with variance 1/2 a pixel, the unit in which the
    energy of the analysis is measured (paper, section 3).
    """
    squared_error = (images - reconstructions).square().flatten(1).sum(1)  # (B,)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)  # (B,)
    return (squared_error + beta * divergence).mean()
