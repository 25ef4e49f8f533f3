"""The decoders of all classes as one module, for training: as many kernels to launch as one decoder has.

The form is that of ``absynth.decoding.FoldedDecoder`` (transposed convolutions as convolutions that write phases,
images in block order), but the weights stay those of ``absynth.vae.Decoder`` and gradients flow to them. Batch norm is
in eval mode: the decoder is the one that the analysis will use.

Shapes: K classes, P latents of each, D latent size, C channels, S pixels a side, n = (S - 12) / 4, N = C*S*S values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.decoding import BLOCK, _blocks_of_stride_1, _phases_of_stride_2
from absynth.vae import Decoder, VAEConfig

EPSILON = nn.BatchNorm2d(1).eps


class StackedDecoders(nn.Module):
    """K decoders: latents (K,P,D) -> images (K,P,N) in (0,1), in block order; differentiable in weights and latents."""

    to_phases: Tensor
    to_cells: Tensor
    inside: Tensor

    def __init__(self, decoders: Sequence[Decoder], sizes: VAEConfig) -> None:
        super().__init__()
        self.sizes, self.classes = sizes, len(decoders)
        states = [decoder.state_dict() for decoder in decoders]
        learned = {name for name, _ in decoders[0].named_parameters()}
        for name in states[0]:
            together = torch.stack([state[name] for state in states])
            if name in learned:
                self.register_parameter(_flat(name), nn.Parameter(together))
            else:
                self.register_buffer(_flat(name), together)
        # Both rearrangements are linear in the kernel: what they do to each of its entries says it all.
        taps = _phases_of_stride_2(torch.eye(25).view(25, 1, 5, 5))  # (2,2,1,25,3,3)
        self.register_buffer("to_phases", taps[:, :, 0].movedim(2, 0).flatten(1), persistent=False)  # (25,36)
        blocks = _blocks_of_stride_1(torch.eye(16).view(16, 1, 4, 4))  # (16,4*16,4,4): block, (2,2,kernel entry)
        cells = blocks.unflatten(1, (2, 2, 16)).movedim(3, 0)  # (16,16,2,2,4,4)
        self.register_buffer("to_cells", cells.flatten(1), persistent=False)
        side = sizes.base_size
        outside = torch.ones(4, 1, 2 * side + 5, 2 * side + 5)  # of the phases; the map has 4n + 9 pixels a side
        outside[2:, :, -1, :] = 0  # odd rows
        outside[1::2, :, :, -1] = 0  # odd columns
        self.register_buffer("inside", outside, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        count, classes, side = latents.shape[1], self.classes, self.sizes.base_size
        weight, bias = self._folded(0)  # (K,D,32,n,n), (K,32)
        hidden = torch.baddbmm(bias.repeat_interleave(side**2, 1)[:, None], latents, weight.flatten(2))  # (K,P,32*n*n)
        # one row of maps a latent, class after class: (K,P,...) -> (P,K*32,n,n)
        hidden = F.elu(hidden).transpose(0, 1).reshape(count, -1, side, side)

        weight, bias = self._folded(1)  # (K,32,16,5,5)
        phases = (weight.flatten(3) @ self.to_phases).unflatten(3, (4, 3, 3))  # (K,I,O,4,3,3)
        kernels = phases.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (K*O*4,I,3,3): what pixel_shuffle reads
        hidden = F.elu(_convolve(hidden, kernels, bias.flatten().repeat_interleave(4), 1, classes))
        hidden = F.pixel_shuffle(hidden, 2)[:, :, :-1, :-1]  # (P,K*16,2n+3,2n+3)

        weight, bias = self._folded(2)  # (K,16,16,5,5)
        phases = (weight.flatten(3) @ self.to_phases).unflatten(3, (4, 3, 3))
        kernels = phases.permute(0, 3, 2, 1, 4, 5).flatten(0, 2)  # (K*4*O,I,3,3): phases outermost
        hidden = F.elu(_convolve(hidden, kernels, bias.repeat(1, 4).flatten(), 1, classes))
        hidden = (hidden.unflatten(1, (classes, 4, -1)) * self.inside).flatten(1, 3)  # (P,K*4*16,2n+5,2n+5)

        weight, last = self.get_parameter("conv_3_weight"), self.get_parameter("conv_3_bias")  # (K,16,C,4,4), (K,C)
        cells = (weight.flatten(3) @ self.to_cells).unflatten(3, (BLOCK**2, 4, 4, 4))  # (K,I,C,16,4,4,4)
        kernels = cells.permute(0, 2, 3, 4, 1, 5, 6).flatten(3, 4).flatten(0, 2)  # (K*C*16,4*I,4,4)
        logits = _convolve(hidden, kernels, last.repeat_interleave(BLOCK**2, 1).flatten(), 2, classes)
        return torch.sigmoid(logits).view(count, classes, -1).transpose(0, 1)

    def _folded(self, layer: int) -> tuple[Tensor, Tensor]:
        """Weight (K,I,O,k,k) and bias (K,O) of a transposed convolution that does its batch norm too."""
        norm = {key: getattr(self, f"bn_{layer}_{key}") for key in ("weight", "bias", "running_mean", "running_var")}
        scale = norm["weight"] / torch.sqrt(norm["running_var"] + EPSILON)  # (K,O)
        weight, bias = getattr(self, f"conv_{layer}_weight"), getattr(self, f"conv_{layer}_bias")
        return weight * scale[:, None, :, None, None], (bias - norm["running_mean"]) * scale + norm["bias"]

    def decoders(self) -> list[Decoder]:
        """The decoders one by one, on the CPU, without gradients."""
        apart = []
        for number in range(self.classes):
            decoder = Decoder(self.sizes)
            state = {name: getattr(self, _flat(name))[number].detach().cpu() for name in decoder.state_dict()}
            decoder.load_state_dict(state)
            apart.append(decoder.eval().requires_grad_(False))
        return apart


def _convolve(maps: Tensor, kernels: Tensor, bias: Tensor, stride: int, groups: int) -> Tensor:
    """A grouped convolution with padding 2: maps (P,K*I,h,w), kernels (K*O,I,k,k), bias (K*O,) -> (P,K*O,h',w')."""
    return F.conv2d(maps, kernels, bias, stride=stride, padding=2, groups=groups)


def rows_by_class(classes: Tensor, count: int) -> Tensor:
    """Where the entries (E,) of each class stand: (count,P) indices into them, filled up with -1."""
    order = classes.argsort(stable=True)
    sizes = (classes[:, None] == torch.arange(count, device=classes.device)).sum(0)
    place = torch.arange(len(classes), device=classes.device) - (sizes.cumsum(0) - sizes)[classes[order]]
    rows = torch.full((count, max(1, int(sizes.max()))), -1, device=classes.device)
    rows[classes[order], place] = order
    return rows


def decode_mixed(decoders: StackedDecoders, latents: Tensor, rows: Tensor) -> Tensor:
    """Latents (E,D) whose classes are told by ``rows`` (K,P) of ``rows_by_class`` -> images (E,N) in block order."""
    decoded = decoders(latents[rows.clamp(min=0)])  # (K,P,N); what fills up is decoded and dropped
    count = len(latents)
    place = torch.empty(count + 1, dtype=torch.int64, device=latents.device)  # the last for what fills up
    place[rows.flatten().where(rows.flatten() >= 0, count)] = torch.arange(rows.numel(), device=rows.device)
    mixed: Tensor = decoded.flatten(0, 1)[place[:count]]
    return mixed


def stacked_tensors(decoders: StackedDecoders, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights and the optimizer's state, by name: what a checkpoint holds."""
    tensors = {f"decoders.{name}": value for name, value in decoders.state_dict().items()}
    for name, parameter in decoders.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def restore_stacked(decoders: StackedDecoders, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of ``stacked_tensors`` back."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    decoders.load_state_dict(part("decoders."))
    for name, parameter in decoders.named_parameters():
        for key, value in part(f"optimizer.{name}.").items():
            # Adam keeps its step count on the CPU
            optimizer.state[parameter][key] = value if value.ndim == 0 else value.to(parameter.device)


def _flat(name: str) -> str:
    """A parameter's name without dots."""
    return name.replace(".", "_")
