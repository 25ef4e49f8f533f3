"""A folder of weight files of every model, untrained and small, so that a command takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from absynth import data, weight_files
from absynth.baselines import CNN, Binarized, MadryCNN
from absynth.decoding import FoldedDecoder, to_blocks
from absynth.training.contrast import Starts
from absynth.vae import Decoder, VAEConfig


def write_all(folder: Path, *, refusal: float = 0.0) -> Path:
    """Weight files under all names of the zoo; ``refusal`` 0: ABS names every image, 1: it refuses every image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _write_abs(folder, refusal)
        binary = {"threshold": 0.5, "alpha": 440.0, "eta": 1e-6, "refusal": refusal}
        binary["decoders_digest"] = weight_files.read(folder / "abs.safetensors").digest
        write(folder, "binary-abs", {"scales": torch.linspace(0.9, 1.1, 10)}, binary)
        for name, maps in (("cnn", (4, 4, 4)), ("binary-cnn", (4, 4, 4)), ("transfer-cnn", (3, 3, 3))):
            network = CNN(maps).eval()
            model = Binarized(network) if name == "binary-cnn" else network
            write(folder, name, model.state_dict(), {"maps": maps, "classes": 10, "binarized": name == "binary-cnn"})
        for name in ("madry", "l2-adversarial", "msd"):
            write(folder, name, {key: value.half() for key, value in MadryCNN().state_dict().items()}, {"classes": 10})
        smoothed = {"maps": (3, 3, 3), "classes": 10, "sigma": 0.5, "samples": 5}
        write(folder, "smoothed-cnn", CNN((3, 3, 3)).eval().state_dict(), smoothed)
        _write_prototype_abs(folder, refusal)
        for name in ("abs", "prototype-abs"):
            file = weight_files.read(folder / f"{name}.safetensors")
            write(folder, f"saturating-{name}", file.tensors, {**file.header["config"], "response": {"a": 0.25}})
    images, labels = data.load("digits", "train")
    stored = {"images": (images * 255).round().to(torch.uint8)[:200], "labels": labels.to(torch.uint8)[:200]}
    write(folder, "nearest-neighbor", stored, {"classes": 10})
    return folder


def _write_abs(folder: Path, refusal: float) -> None:
    tensors = {"candidates": torch.randn(10, 6, 8).half()}
    for number in range(10):
        for name, value in Decoder(VAEConfig()).state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensors[f"{number}.decoder.{name}"] = value
    config = {"classes": 10, "image_size": 28, "channels": 1, "latent_size": 8, "beta": 1.0}
    write(folder, "abs", tensors, {**config, "alpha": 440.0, "eta": 1e-6, "refusal": refusal})


def _write_prototype_abs(folder: Path, refusal: float) -> None:
    """The decoders of the ABS beside it, with five prototypes a class."""
    file = weight_files.read(folder / "abs.safetensors")
    tensors = {name: value for name, value in file.tensors.items() if ".decoder." in name}
    tensors |= {f"{number}.latents": torch.randn(5, 8).half() for number in range(10)}
    write(folder, "prototype-abs", tensors, file.header["config"])


def candidate_energies(decoder: Decoder, latents: Tensor, images: Tensor) -> Tensor:
    """The energy (B,) that each image (B,C,S,S) has at the best of these latents (M,D); beta is 1."""
    starts = Starts.of(FoldedDecoder(decoder), latents, 1.0)
    blocks = to_blocks(images)
    return starts.step(blocks, starts.candidates.best(blocks, None))[0]


def write(folder: Path, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    header = {"model": name, "config": config, "data": "digits", "seed": 0, "accuracy": 0.5}
    weight_files.write(folder / f"{name}.safetensors", tensors, header)


def save_picture(path: Path, image: Tensor, scale: int = 5) -> Path:
    """An image (1,28,28) in [0,1] as dark ink on white paper, enlarged: what a user has."""
    pixels = ((1 - image[0]) * 255).round().byte().numpy()
    Image.fromarray(pixels).resize((28 * scale, 28 * scale)).save(path)
    return path
