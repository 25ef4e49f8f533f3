"""The networks ABS is compared with. Each is a Classifier: float32 images (B,C,S,S) in [0,1] -> logits (B,K).

In eval mode all are pure functions of the image: the logits of an image do not depend on its batch beyond float32
rounding (1e-4 at most for the networks, whose matrix products sum in an order that varies with the batch size).

Source: Schott et al. 2019 (arXiv 1805.09190), appendix, and the layer sizes of the authors' released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from absynth.checks import check_images
from absynth.errors import InputError
from absynth.nearest import differences, nearest_of_each_class, offsets_of, rounding_slack
from absynth.planes import Prototypes
from absynth.responses import Threshold, different
from absynth.shortlist import ComparesAll


class Network(nn.Module):
    """A module whose convolutions are laid out as its device likes them: with channels last on a CPU, where they take
    half the time then, and plainly on a GPU, which is slow that way where images have one channel."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """What ``to``, ``cuda`` and ``half`` go through."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        for weights in self.parameters():
            if weights.ndim == 4:
                layout = torch.channels_last if weights.device.type == "cpu" else torch.contiguous_format
                weights.data = weights.data.contiguous(memory_format=layout)


class CNN(Network):
    """The plain convolutional network of the paper.

    Kernels 5, 4, 3, 5 with strides 1, 2, 2, 1; batch norm and ELU after the first three.

    ``maps`` (20, 70, 256) is the paper's CNN, (32, 32, 64) its transfer CNN, the source of transfer attacks. The last
    kernel covers what is left of the image, 5 pixels of 28, so that other image sizes work as well.

    Images float32 (B, channels, image_size, image_size) in [0,1] -> logits (B, classes). Other input: InputError.
    """

    def __init__(
        self,
        maps: tuple[int, int, int] = (20, 70, 256),
        classes: int = 10,
        channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        if image_size < 14:
            raise InputError(f"image_size is {image_size}; the CNN needs at least 14 pixels a side: enlarge the images")
        self.maps, self.classes, self.channels, self.image_size = tuple(maps), classes, channels, image_size
        side = image_size - 4  # after kernel 5, stride 1: 24 of 28
        side = (side - 4) // 2 + 1  # kernel 4, stride 2: 11
        side = (side - 3) // 2 + 1  # kernel 3, stride 2: 5
        self.conv_0 = nn.Conv2d(channels, maps[0], 5)
        self.bn_0 = nn.BatchNorm2d(maps[0])
        self.conv_1 = nn.Conv2d(maps[0], maps[1], 4, stride=2)
        self.bn_1 = nn.BatchNorm2d(maps[1])
        self.conv_2 = nn.Conv2d(maps[1], maps[2], 3, stride=2)
        self.bn_2 = nn.BatchNorm2d(maps[2])
        self.conv_3 = nn.Conv2d(maps[2], classes, side)
        self._lay_out()

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, channels=self.channels, size=self.image_size)
        hidden = F.elu(self.bn_0(self.conv_0(images)))  # (B,20,24,24)
        hidden = F.elu(self.bn_1(self.conv_1(hidden)))  # (B,70,11,11)
        hidden = F.elu(self.bn_2(self.conv_2(hidden)))  # (B,256,5,5)
        logits: Tensor = self.conv_3(hidden).flatten(1)  # (B,K,1,1) -> (B,K)
        return logits


class Binarized(nn.Module):
    """A classifier of the thresholded image: ``classifier`` sees 1 where a pixel is >= ``threshold``, else 0.

    With the CNN inside, trained so, this is the paper's Binary CNN. The forward pass is exact. The true gradient is
    zero almost everywhere; autograd is given the straight-through one instead, d(logits)/d(thresholded image), so that
    gradient attacks have a direction to follow. In eval mode, without gradients, images that are the same behind the
    threshold are classified once: attacks that know only answers ask about many such.
    """

    def __init__(self, classifier: nn.Module, threshold: float = 0.5) -> None:
        super().__init__()
        self.classifier = classifier
        self.response = Threshold(threshold)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, channels=images.shape[1] if images.ndim == 4 else 1, size=None)
        seen = self.response(images)
        if self.training or seen.requires_grad or len(seen) < 2:
            logits: Tensor = self.classifier(seen)
            return logits
        first, which = different(seen)
        logits = self.classifier(seen[first])[which]
        return logits


class NearestNeighbor(ComparesAll):
    """logit_c = minus the smallest L2 distance to a training image of class c.

    ``images`` float32 (N,C,S,S) in [0,1] and ``labels`` (N,) are the training set; images are kept rounded to 256
    gray levels, which changes nothing for the MNIST family. Labels are 0 ... K-1 and every class needs an image.

    The nearest images are found by one matrix product a chunk; the distances to them are then taken as differences in
    float64, so that the answer neither depends on the batch nor loses digits when an image lies close to a stored one.
    The gradient is that of the distance to the selected image: exact wherever the nearest image is unique.

    Memory: N*C*S*S*5 bytes (235 MB for MNIST's 60,000), and 4*N bytes for each image of a chunk.
    """

    images: Tensor  # (N,C,S,S) uint8, sorted by class
    labels: Tensor  # (N,) int64, ascending
    _points: Tensor  # (N,P) float32 in [0,1]: the images, flat
    _offsets: Tensor  # (N,) float32: ||p||^2 / 2

    chunk_size = 64  # images a matrix product

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
            raise InputError(f"training images have shape {tuple(images.shape)}; expected (N,C,S,S): reshape them")
        check_images(images, channels=images.shape[1], size=images.shape[-1])
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise InputError(
                f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected {len(images)} integers"
            )
        if labels.min() < 0:
            raise InputError(f"a label is {int(labels.min())}; labels number the classes and must be 0 or more")
        counts = torch.bincount(labels)
        if not counts.all():
            missing = int((counts == 0).nonzero()[0])
            raise InputError(f"class {missing} has no training image; every class up to {len(counts) - 1} needs one")
        order = torch.argsort(labels, stable=True)
        self.register_buffer("images", (images[order] * 255).round().to(torch.uint8))
        self.register_buffer("labels", labels[order].long())
        self.register_buffer("_points", None, persistent=False)
        self.register_buffer("_offsets", None, persistent=False)
        self._prepare()
        self.register_load_state_dict_post_hook(lambda model, _keys: model._prepare())  # type: ignore[no-untyped-call]

    def _prepare(self) -> None:
        """Derive the flat images and what their distances share, from the stored ones."""
        self.class_counts: list[int] = torch.bincount(self.labels).tolist()
        self._points = self.images.flatten(1).float() / 255
        self._offsets = offsets_of(self._points)

    def forward(self, images: Tensor) -> Tensor:
        chunks = torch.split(self._flat(images), self.chunk_size)
        return torch.cat([self._answers(chunk, self._nearest(chunk)) for chunk in chunks])

    def nearest(self, images: Tensor) -> Tensor:
        """Indices (B,K) into ``self.images`` of the nearest stored image of each class, for images (B,C,S,S)."""
        return torch.cat([self._nearest(chunk) for chunk in torch.split(self._flat(images), self.chunk_size)])

    def prototypes(self) -> Prototypes:
        """What ``absynth.certificates`` needs: every training image, without cost."""
        # the last step rounds a distance to float32: what is that close may come out equal, and a tie counts as broken
        rounding = 2.0**-21 * self._points.shape[1]
        slack = rounding_slack(self._points, self._offsets) + rounding
        return Prototypes(self._points, self._offsets.new_zeros(len(self._offsets)), self.labels, slack)

    def _nearest(self, queries: Tensor) -> Tensor:
        return nearest_of_each_class(queries, self._points, self._offsets, self.class_counts)

    def _stored(self) -> tuple[Tensor, Tensor, Sequence[int]]:
        return self._points, self._offsets, self.class_counts

    def _flat(self, images: Tensor) -> Tensor:
        check_images(images, channels=self.images.shape[1], size=self.images.shape[-1])
        return images.flatten(1)

    def _answers(self, flat: Tensor, nearest: Tensor) -> Tensor:
        apart = differences(flat, self._points, nearest)  # (B,P), (B,K) -> (B,K,P)
        logits: Tensor = -torch.linalg.vector_norm(apart, dim=2).to(flat.dtype)
        return logits


class MadryCNN(Network):
    """The network of Madry et al. 2018 (arXiv 1706.06083) for MNIST, made robust by adversarial training.

    5x5 convolutions of 32 and 64 maps that keep the size, each with ReLU and 2x2 max-pooling; a dense layer of 1,024.

    Images float32 (B, channels, image_size, image_size) in [0,1] -> logits (B, classes). Other input: InputError.
    """

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 4:
            raise InputError(f"image_size is {image_size}; two poolings need at least 4 pixels: enlarge the images")
        self.classes, self.channels, self.image_size = classes, channels, image_size
        self.conv_0 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv_1 = nn.Conv2d(32, 64, 5, padding=2)
        self.dense_0 = nn.Linear(64 * (image_size // 4) ** 2, 1024)
        self.dense_1 = nn.Linear(1024, classes)
        self._lay_out()

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, channels=self.channels, size=self.image_size)
        # ReLU after pooling instead of before: the same value, for a quarter of the work.
        hidden = F.relu(F.max_pool2d(self.conv_0(images), 2))  # (B,32,14,14)
        hidden = F.relu(F.max_pool2d(self.conv_1(hidden), 2))  # (B,64,7,7)
        hidden = F.relu(self.dense_0(hidden.flatten(1)))  # (B,3136) -> (B,1024)
        logits: Tensor = self.dense_1(hidden)
        return logits
