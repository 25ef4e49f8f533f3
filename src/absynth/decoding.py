"""A decoder in the form the analysis runs it: batch norm folded in, and its derivative along the latents.

The analysis decodes tens of thousands of small images, so the form matters (``docs/performance.md``). Every stride-2
transposed convolution becomes a 3x3 convolution whose output holds the four phases of the enlarged image as channels;
the last layer reads those phases directly and writes 4x4 blocks of pixels as channels. Images therefore live in *block
order*: ``to_blocks`` permutes the pixels of an image, which changes no distance, and ``from_blocks`` undoes it.

Shapes: P latents at once, D latent size, C channels, S pixels a side, n = (S - 12) / 4 (4 for S = 28), and
N = C*S*S values an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.vae import Decoder

BLOCK = 4  # pixels a side of the blocks that the last layer writes


def to_blocks(images: Tensor) -> Tensor:
    """Images (P,C,S,S) -> (P,N), the pixels in block order."""
    return F.pixel_unshuffle(images, BLOCK).flatten(1)  # (P,C*16,S/4,S/4) -> (P,N)


def from_blocks(blocks: Tensor, channels: int = 1) -> Tensor:
    """(...,N) in block order -> images (...,C,S,S). The inverse of ``to_blocks``."""
    side = round((blocks.shape[-1] / channels) ** 0.5) // BLOCK
    folded = blocks.reshape(-1, channels * BLOCK**2, side, side)  # (...,N) -> (P,C*16,S/4,S/4)
    images = F.pixel_shuffle(folded, BLOCK)
    return images.reshape(*blocks.shape[:-1], *images.shape[1:])


@contextmanager
def whole_precision(like: Tensor) -> Iterator[None]:
    """Where ``like`` lies on a GPU: convolutions of float32 in float32, where cuDNN would take ten bits of each number,
    and by algorithms that give the same answer every time."""
    if not like.is_cuda:
        yield
        return
    library = torch.backends.cudnn
    before = library.allow_tf32, library.deterministic
    library.allow_tf32, library.deterministic = False, True
    try:
        yield
    finally:
        library.allow_tf32, library.deterministic = before


class Activations(NamedTuple):
    """What the forward pass leaves for the tangents: the hidden layers after the ELU, and the images (P,N)."""

    hidden_0: Tensor  # (P,n*n*32)
    hidden_1: Tensor  # (P,64,n+2,n+2), four phases of 16 maps
    hidden_2: Tensor  # (P,64,2n+5,2n+5), four phases of 16 maps
    images: Tensor  # (P,N)


class FoldedDecoder(nn.Module):
    """The function of a trained ``Decoder`` in eval mode: latents (P,D) -> images (P,N) in (0,1), in block order."""

    input_weight: Tensor
    input_bias: Tensor
    weight_1: Tensor
    bias_1: Tensor
    weight_2: Tensor
    bias_2: Tensor
    weight_3: Tensor
    bias_3: Tensor
    back_1: Tensor
    back_2: Tensor

    @torch.no_grad()
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        weight_0, bias_0 = _fold(decoder.conv_0, decoder.bn_0)
        weight_1, bias_1 = _fold(decoder.conv_1, decoder.bn_1)
        weight_2, bias_2 = _fold(decoder.conv_2, decoder.bn_2)
        weight_3, bias_3 = decoder.conv_3.weight, decoder.conv_3.bias
        assert bias_3 is not None
        self.latent_size, self.maps, self.side = weight_0.shape[0], weight_0.shape[1], weight_0.shape[2]
        self.channels = weight_3.shape[1]
        # (D,32,n,n) -> (D,n*n*32): one matrix product that leaves the maps innermost, as channels-last wants them
        self._keep("input_weight", weight_0.permute(0, 2, 3, 1).reshape(self.latent_size, -1))
        self._keep("input_bias", bias_0.repeat(self.side**2))
        # pixel_shuffle wants the phases innermost, (maps,2,2); the last layer wants them outermost, (2,2,maps)
        self._keep("weight_1", _phases_of_stride_2(weight_1).permute(2, 0, 1, 3, 4, 5).flatten(0, 2))
        self._keep("bias_1", bias_1.repeat_interleave(4))
        self._keep("weight_2", _phases_of_stride_2(weight_2).flatten(0, 2))
        self._keep("bias_2", bias_2.repeat(4))
        self._keep("weight_3", _blocks_of_stride_1(weight_3))
        self._keep("bias_3", bias_3.repeat_interleave(BLOCK**2))
        # the transposes of the two stride-1 convolutions, for ``pullback``
        self._keep("back_1", self.weight_1.flip(2, 3).transpose(0, 1))
        self._keep("back_2", self.weight_2.flip(2, 3).transpose(0, 1))

    def _keep(self, name: str, tensor: Tensor) -> None:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        self.register_buffer(name, tensor.detach().contiguous(memory_format=layout), persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.activations(latents).images

    def activations(self, latents: Tensor) -> Activations:
        """Latents (P,D) -> the images and what their tangents need."""
        hidden_0 = F.elu(torch.addmm(self.input_bias, latents, self.input_weight), inplace=True)
        hidden_1 = F.elu(F.conv2d(self._as_maps(hidden_0), self.weight_1, self.bias_1, padding=2), inplace=True)
        hidden_2 = F.conv2d(_enlarge(hidden_1), self.weight_2, self.bias_2, padding=2)
        hidden_2 = F.elu(_clear_outside(hidden_2), inplace=True)  # the ELU of 0 is 0
        logits = F.conv2d(hidden_2, self.weight_3, self.bias_3, stride=2, padding=2)
        return Activations(hidden_0, hidden_1, hidden_2, torch.sigmoid(logits).flatten(1))

    def tangents(self, activations: Activations) -> Tensor:
        """The Jacobian of the images with respect to the latents: (P,D,N), exact, in forward mode."""
        hidden_0, hidden_1, hidden_2, images = activations
        count, size = len(images), self.latent_size
        slope_0 = _elu_slope(hidden_0)[:, None] * self.input_weight  # (P,1,n*n*32) * (D,n*n*32)
        slope_0 = self._as_maps(slope_0.flatten(0, 1))  # (P,D,n*n*32) -> (P*D,32,n,n)
        slope_1 = F.conv2d(slope_0, self.weight_1, padding=2)
        slope_1 = _times_each(slope_1, _elu_slope(hidden_1), size)
        slope_2 = F.conv2d(_enlarge(slope_1), self.weight_2, padding=2)
        slope_2 = _times_each(slope_2, _clear_outside(_elu_slope(hidden_2)), size)
        slope_3 = F.conv2d(slope_2, self.weight_3, stride=2, padding=2)
        slope_3 = slope_3.flatten(1).view(count, size, -1)  # (P*D,C*16,S/4,S/4) -> (P,D,N)
        return slope_3 * (images * (1 - images))[:, None]

    def pullback(self, activations: Activations, cotangents: Tensor) -> Tensor:
        """Cotangents (P,N) of the images -> those of the latents (P,D): the Jacobian's transpose, in reverse mode."""
        hidden_0, hidden_1, hidden_2, images = activations
        blocks = self.side + 3  # a side
        slope_3 = (cotangents * images * (1 - images)).view(len(images), -1, blocks, blocks)
        slope_3 = slope_3.contiguous(memory_format=torch.channels_last)
        slope_2 = F.conv_transpose2d(slope_3, self.weight_3, stride=2, padding=2, output_padding=1)
        slope_2 = _clear_outside(slope_2.mul_(_elu_slope(hidden_2)))
        slope_1 = F.pad(F.conv2d(slope_2, self.back_2), (0, 1, 0, 1))  # (P,16,2n+4,2n+4)
        slope_1 = F.pixel_unshuffle(slope_1, 2).mul_(_elu_slope(hidden_1))
        slope_0 = F.conv2d(slope_1, self.back_1).permute(0, 2, 3, 1).flatten(1)  # (P,32,n,n) -> (P,n*n*32)
        return (slope_0 * _elu_slope(hidden_0)) @ self.input_weight.T

    def _as_maps(self, hidden: Tensor) -> Tensor:
        """(P,n*n*32) -> (P,32,n,n), channels-last."""
        return hidden.view(-1, self.side, self.side, self.maps).permute(0, 3, 1, 2)


def _fold(convolution: nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a transposed convolution that does its batch norm (in eval mode) too."""
    assert norm.running_mean is not None and norm.running_var is not None and convolution.bias is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return convolution.weight * scale[:, None, None], (convolution.bias - norm.running_mean) * scale + norm.bias


def _phases_of_stride_2(weight: Tensor) -> Tensor:
    """Weight (I,O,5,5) of a stride-2 transposed convolution -> (2,2,O,I,3,3): one 3x3 convolution for each phase.

    Output pixel 2q + r takes input pixel q - m with weight r + 2m: the convolution's tap 2 - m, with padding 2.
    """
    inputs, outputs, kernel, _ = weight.shape
    phases = weight.new_zeros(2, 2, outputs, inputs, 3, 3)
    for row in range(kernel):
        for column in range(kernel):
            taps = (2 - row // 2, 2 - column // 2)
            phases[row % 2, column % 2, :, :, taps[0], taps[1]] = weight[:, :, row, column].T
    return phases


def _blocks_of_stride_1(weight: Tensor) -> Tensor:
    """Weight (I,C,4,4) of a stride-1 transposed convolution -> (C*16,4*I,4,4): phases in, 4x4 blocks of pixels out.

    Output pixel 4q + r takes input pixel 4q + r - k, which is phase (r - k) mod 2 of cell 2q + floor((r - k) / 2).
    """
    inputs, channels, kernel, _ = weight.shape
    blocks = weight.new_zeros(channels, BLOCK, BLOCK, 2, 2, inputs, 4, 4)
    for r in range(BLOCK):
        for k in range(kernel):
            for s in range(BLOCK):
                for j in range(kernel):
                    cell_row, phase_row = divmod(r - k, 2)
                    cell_column, phase_column = divmod(s - j, 2)
                    taps = (cell_row + 2, cell_column + 2)
                    blocks[:, r, s, phase_row, phase_column, :, taps[0], taps[1]] = weight[:, :, k, j].T
    return blocks.reshape(channels * BLOCK**2, 4 * inputs, 4, 4)


def _enlarge(phases: Tensor) -> Tensor:
    """Phases as channels (P,4*16,n+2,n+2) -> maps (P,16,2n+3,2n+3), without the row and column that lie outside."""
    return F.pixel_shuffle(phases, 2)[:, :, :-1, :-1]


def _clear_outside(phases: Tensor) -> Tensor:
    """Set to 0, in place, what lies outside the (4n+9)-pixel map that the phases (P,4*16,2n+5,2n+5) make up."""
    maps = phases.shape[1] // 4
    phases[:, 2 * maps :, -1, :] = 0  # odd rows
    phases[:, maps : 2 * maps, :, -1] = 0  # odd columns
    phases[:, 3 * maps :, :, -1] = 0
    return phases


def _elu_slope(hidden: Tensor) -> Tensor:
    """The derivative of the ELU from its value: 1 where positive, value + 1 (= e^input) where not."""
    return hidden.clamp(max=0).add_(1)


def _times_each(tangents: Tensor, slope: Tensor, size: int) -> Tensor:
    """Multiply in place the D tangents (P*D,C,h,w) of each of P problems by that problem's slope (P,C,h,w)."""
    # as (P,D,h,w,C): channels-last memory, so that the views need no copy
    by_problem = tangents.permute(0, 2, 3, 1).unflatten(0, (-1, size))
    by_problem.mul_(slope.permute(0, 2, 3, 1)[:, None])
    return tangents
