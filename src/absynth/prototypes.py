"""ABS with an exact inner minimum: every class explains images by a finite set of decoded prototypes.

    f_c(x) = min over the class's latents z_i of  ||x - G_c(z_i)||^2 + beta/2 ||z_i||^2,        logit_c = -f_c(x) / N

Where ABS searches a continuum and may miss its minimum, this one compares all there is: classification is one matrix
product and an argmin, and robustness can be certified (``absynth.certificates``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from absynth.checks import check_images
from absynth.classifiers import Analysis, Calibrated
from absynth.data import digest
from absynth.decoding import FoldedDecoder, from_blocks
from absynth.errors import InputError
from absynth.nearest import differences, nearest_of_each_class, offsets_of, rounding_slack
from absynth.planes import Prototypes
from absynth.responses import Ramp
from absynth.shortlist import ComparesAll

CHUNK = 128  # images compared at once: bounds the memory, whatever the batch
DECODED = 64  # prototypes decoded at once


class PrototypeABS(Calibrated, ComparesAll):
    """The class whose nearest prototype explains an image best. Images (B,C,S,S) in [0,1] -> logits (B,K).

    ``latents``: for every class (M_c,D), decoded here by its decoder; ``beta`` is the weight of their prior cost.
    Raises InputError for other images. A pure function of each image; the gradient is exact wherever the nearest
    prototype of each class is unique. Memory: 4*N*M bytes for the decoded prototypes.
    """

    points: Tensor  # (M,N), sorted by class
    costs: Tensor  # (M,)
    latents: Tensor  # (M,D)
    _offsets: Tensor

    # from the latents and the decoders, by arithmetic that differs between processors
    derived_buffers = ("points", "costs")

    def __init__(
        self,
        decoders: Iterable[nn.Module],
        latents: Iterable[Tensor],
        *,
        beta: float = 1.0,
        alpha: float = 440.0,
        eta: float = 0.000039,
        refusal: float = 0.25,
    ) -> None:
        super().__init__(alpha, eta, refusal)
        self.beta = beta
        every, decoders = list(latents), list(decoders)
        self.decoders_digest = digest(*(one for decoder in decoders for one in decoder.state_dict().values()))
        folded: list[Any] = [FoldedDecoder(decoder) for decoder in decoders]  # type: ignore[arg-type]
        if len(folded) < 2 or len(folded) != len(every) or any(len(one) == 0 for one in every):
            raise InputError(
                f"{len(folded)} decoders and latents of {len(every)} classes: expected at least 2 decoders, and for "
                "each a class's latents (M,D), at least one"
            )
        self.class_counts = [len(one) for one in every]
        self._image_shape = folded[0].channels, 4 * folded[0].side + 12
        with torch.no_grad():
            decoded = [
                from_blocks(decoder(chunk), decoder.channels).flatten(1)
                for decoder, one in zip(folded, every, strict=True)
                for chunk in one.split(DECODED)
            ]
        self.register_buffer("latents", torch.cat(every))
        self.register_buffer("points", torch.cat(decoded))
        self.register_buffer("costs", beta / 2 * self.latents.square().sum(1))
        self.register_buffer("_offsets", offsets_of(self.points, self.costs), persistent=False)
        self._known = digest(self.points, self.costs)
        self.register_load_state_dict_post_hook(lambda model, _keys: model._replaced())  # type: ignore[no-untyped-call]
        self.eval().requires_grad_(False)

    def _replaced(self) -> None:
        """Derive anew what follows from the prototypes, which were loaded: from decoders that nobody named."""
        self._offsets = offsets_of(self.points, self.costs)
        known = digest(self.points, self.costs)
        if known != self._known:
            self._known, self.decoders_digest = known, digest(self.points)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(C, S): channels and pixels a side."""
        return self._image_shape

    def forward(self, images: Tensor) -> Tensor:
        chunks = self._flat(images).split(CHUNK)
        return torch.cat([self._answers(chunk, self._nearest(chunk)) for chunk in chunks])

    @torch.no_grad()
    def analyze(self, images: Tensor) -> Analysis:
        """Images (B,C,S,S) -> how every class explains them, or what it sees of them: by its nearest prototype."""
        chunks = self._flat(images).split(CHUNK)
        nearest = [self._nearest(chunk) for chunk in chunks]  # of (b,K)
        logits = torch.cat([self._answers(*pair) for pair in zip(chunks, nearest, strict=True)])
        chosen = torch.cat(nearest)
        return Analysis(
            energies=-logits,
            latents=self.latents[chosen],
            reconstructions=self.points[chosen].unflatten(2, images.shape[1:]),
            probabilities=self.posterior(logits),
        )

    def prototypes(self) -> Prototypes:
        """What ``absynth.certificates`` needs."""
        counts = torch.tensor(self.class_counts, device=self.points.device)
        labels = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        # the last step rounds f / N to float32: what is that close may come out equal, and a tie counts as broken
        pixels = self.points.shape[1]
        rounding = 2.0**-22 * (pixels + float(self.costs.max()))
        return Prototypes(self.points, self.costs, labels, rounding_slack(self.points, self._offsets) + rounding)

    def _nearest(self, queries: Tensor) -> Tensor:
        return nearest_of_each_class(queries, self.points, self._offsets, self.class_counts)

    def _stored(self) -> tuple[Tensor, Tensor, Sequence[int]]:
        return self.points, self._offsets, self.class_counts

    def _flat(self, images: Tensor) -> Tensor:
        check_images(images, channels=self.image_shape[0], size=self.image_shape[1])
        return images.flatten(1)

    def _answers(self, flat: Tensor, nearest: Tensor) -> Tensor:
        apart = differences(flat, self.points, nearest)  # (B,K,N)
        energies = apart.square().sum(2) + self.costs[nearest].double()
        return -(energies / flat.shape[1]).to(flat.dtype)

    def extra_repr(self) -> str:
        return f"prototypes={self.class_counts}, beta={self.beta}, alpha={self.alpha}, eta={self.eta}"


class SaturatingPrototypeABS(PrototypeABS):
    """``PrototypeABS`` of the image's response: f_c(x) = min over the class's prototypes of ||t(x) - p||^2 + K.

    As robust in L-infinity as a threshold would make it, and as robust in L2 as ABS, more or less: ``response`` is a
    ramp between the two. Arguments, errors and all else: as for ``PrototypeABS``. The gradient is exact, and so it is 0
    where the ramp is flat.
    """

    def __init__(
        self,
        decoders: Iterable[nn.Module],
        latents: Iterable[Tensor],
        *,
        response: Ramp,
        beta: float = 1.0,
        alpha: float = 440.0,
        eta: float = 0.000039,
        refusal: float = 0.25,
    ) -> None:
        super().__init__(decoders, latents, beta=beta, alpha=alpha, eta=eta, refusal=refusal)
        self.response = response

    def _flat(self, images: Tensor) -> Tensor:
        response: Tensor = self.response(super()._flat(images))
        return response

    def prototypes(self) -> Prototypes:
        """What ``absynth.certificates`` needs."""
        plain = super().prototypes()
        # f(p') - f(p) changes by at most 2 ||p' - p||_1 <= 2 N times the error of t; the rest is for the certificates'
        # own sums over kinks of the ramp, which err by less than 1e-9
        rounding = 2 * self.points.shape[1] * self.response.rounding + 1e-6
        return replace(plain, slack=plain.slack + rounding, response=self.response)
