"""The models by name, made from their weight files (``absynth.weight_files``)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from absynth import data
from absynth.baselines import CNN, Binarized, MadryCNN, NearestNeighbor
from absynth.candidates import prior_candidates
from absynth.classifiers import ABS
from absynth.errors import InputError, unknown_name
from absynth.kept import kept_file
from absynth.prototypes import PrototypeABS, SaturatingPrototypeABS
from absynth.responses import Ramp, Threshold
from absynth.smoothing import Smoothed
from absynth.vae import Decoder, VAEConfig
from absynth.weight_files import WeightFile, read

WEIGHTS = Path(str(files("absynth"))) / "weights"

DESCRIPTIONS = {
    "abs": "analysis by synthesis: one generative model per class",
    "binary-abs": "ABS on the thresholded image, energies scaled per class",
    "cnn": "plain convolutional network",
    "binary-cnn": "the same on the thresholded image",
    "transfer-cnn": "a smaller CNN, the source of transfer attacks",
    "nearest-neighbor": "nearest training image of each class in L2",
    "madry": "adversarially trained network (L-infinity 0.3)",
    "prototype-abs": "ABS with a finite set of explanations: exact and certified",
    "saturating-abs": "ABS on saturated pixels: robust in L2 and L-infinity at once",
    "saturating-prototype-abs": "the same with a finite set of explanations: certified",
    "l2-adversarial": "adversarially trained network (L2 2.0)",
    "msd": "network trained against L-infinity 0.3, L2 2.0 and L1 10 at once",
    "smoothed-cnn": "majority vote of a network over noisy copies of the image",
}


def names() -> tuple[str, ...]:
    """The models that ``load`` knows by name."""
    return tuple(DESCRIPTIONS)


def path_of(name: str | Path, folder: str | Path | None = None) -> Path:
    """Where the weights of a model are: a name of ``names()`` in ``folder`` (default: shipped), or a file's path."""
    if isinstance(name, Path) or (isinstance(name, str) and name.endswith(".safetensors")):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"no weight file at {path}: give an existing file or one of {', '.join(names())}")
        return path
    if not isinstance(name, str) or name not in DESCRIPTIONS:
        raise unknown_name("model", name, DESCRIPTIONS)
    return Path(folder or WEIGHTS) / f"{name}.safetensors"


def load(
    name: str | Path,
    *,
    folder: str | Path | None = None,
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A model ready to use, in eval mode: float32 images (B,C,S,S) in [0,1] -> logits (B,K).

    ``name`` is one of ``names()`` or the path of a weight file; ``folder`` holds weight files under these names
    (default: those shipped with the package, trained on MNIST). "nearest-neighbor" has no weights of its own: it loads
    its training set, see ``absynth.data.load``, which looks in ``root``
    first. Raises InputError for unknown names and damaged files.
    """
    if name == "nearest-neighbor" and folder is None and not path_of(name).exists():
        return NearestNeighbor(*data.load("mnist", "train", root)).eval().to(device)
    path = path_of(name, folder)
    file = read(path)
    kind = str(file.header.get("model"))
    if kind not in _BUILDERS:
        raise InputError(f"weight file {path} is of a model {kind!r} that this version does not know: update absynth")
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
            model = _BUILDERS[kind](file, path.parent)
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"weight file {path} does not fit model {kind!r} ({error}): train or download it again"
        ) from error
    return model.eval().requires_grad_(False).to(device)


def from_released(path: str | Path, *, binary: bool = False) -> ABS:
    """ABS, or Binary ABS, with the decoders that the paper's authors released, converted to safetensors.

    Keys are "CLASS.Decoder.LAYER"; the encoders in the file are not used. The candidates are ``prior_candidates``;
    alpha, eta and gamma are those of the released code (``absynth.analysis.PAPER`` is the schedule they belong to).
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"cannot read released weights {path} ({error}): give a safetensors file") from error
    classes = 1 + max(int(name.split(".")[0]) for name in tensors)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        decoders = [Decoder(VAEConfig()).eval() for _ in range(classes)]
    for number, decoder in enumerate(decoders):
        prefix = f"{number}.Decoder."
        weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        counts = {name: value for name, value in decoder.state_dict().items() if name.endswith("num_batches_tracked")}
        decoder.load_state_dict({**counts, **weights})
    candidates = prior_candidates()[None].expand(classes, -1, -1).contiguous()
    if not binary:
        return ABS(decoders, candidates)
    scales = torch.tensor([1, 0.96, 1.001, 1.06, 0.98, 0.96, 1.03, 1, 1, 1])
    return ABS(decoders, candidates, response=Threshold(), scales=scales)


def _abs(file: WeightFile, folder: Path, response: Ramp | None = None) -> ABS:
    """Tensors "K.decoder.*" of every class K, and "candidates" (K,M,D)."""
    config = file.header["config"]
    return ABS(
        decoders_of(file), file.tensors["candidates"].float(), response=response, alpha=config["alpha"],
        eta=config["eta"], beta=config["beta"], refusal=config["refusal"], kept=kept_file(file.digest),
    )  # fmt: skip


def _saturating_abs(file: WeightFile, folder: Path) -> ABS:
    """As ``_abs``, with "response" in the configuration."""
    return _abs(file, folder, Ramp(file.header["config"]["response"]["a"]))


def decoders_of(file: WeightFile) -> list[Decoder]:
    """The decoders in a weight file, one a class: tensors "K.decoder.*"."""
    config = file.header["config"]
    sizes = VAEConfig(config["image_size"], config["channels"], config["latent_size"])
    decoders = []
    for number in range(config["classes"]):
        decoder = Decoder(sizes)
        prefix = f"{number}.decoder."
        weights = {name[len(prefix) :]: value for name, value in file.tensors.items() if name.startswith(prefix)}
        counts = {name: value for name, value in decoder.state_dict().items() if name.endswith("num_batches_tracked")}
        decoder.load_state_dict({**counts, **weights})
        decoders.append(decoder.eval())
    return decoders


def _binary_abs(file: WeightFile, folder: Path) -> ABS:
    """Tensor "scales" (K,); the decoders are those of the ABS weights beside it."""
    config = file.header["config"]
    decoders = read(folder / "abs.safetensors")
    if decoders.digest != config["decoders_digest"]:
        raise InputError(
            f"binary-abs in {folder} was made for other abs weights: run 'absynth train binary-abs --out {folder}'"
        )
    return ABS(
        decoders_of(decoders), decoders.tensors["candidates"].float(), response=Threshold(config["threshold"]),
        scales=file.tensors["scales"], alpha=config["alpha"], eta=config["eta"], beta=decoders.header["config"]["beta"],
        refusal=config["refusal"], kept=kept_file(decoders.digest),
    )  # fmt: skip


def _prototype_abs(file: WeightFile, folder: Path) -> PrototypeABS:
    """Tensors "K.latents" (M_K,D) of every class K, and its decoders as in ABS weights, "K.decoder.*"."""
    config = file.header["config"]
    return PrototypeABS(
        decoders_of(file), [file.tensors[f"{number}.latents"].float() for number in range(config["classes"])],
        beta=config["beta"], alpha=config["alpha"], eta=config["eta"], refusal=config["refusal"],
    )  # fmt: skip


def _saturating_prototype_abs(file: WeightFile, folder: Path) -> SaturatingPrototypeABS:
    """As ``_prototype_abs``, with "response" in the configuration."""
    config = file.header["config"]
    return SaturatingPrototypeABS(
        decoders_of(file), [file.tensors[f"{number}.latents"].float() for number in range(config["classes"])],
        response=Ramp(config["response"]["a"]), beta=config["beta"], alpha=config["alpha"], eta=config["eta"],
        refusal=config["refusal"],
    )  # fmt: skip


def _cnn(file: WeightFile, folder: Path) -> nn.Module:
    config = file.header["config"]
    network = CNN(tuple(config["maps"]), config["classes"], config.get("channels", 1), config.get("image_size", 28))
    model: nn.Module = Binarized(network) if config.get("binarized") else network
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in file.tensors.items()}
    )
    return model


def _madry(file: WeightFile, folder: Path) -> nn.Module:
    config = file.header["config"]
    model = MadryCNN(config["classes"], config.get("channels", 1), config.get("image_size", 28))
    model.load_state_dict({name: value.float() for name, value in file.tensors.items()})
    return model


def _smoothed_cnn(file: WeightFile, folder: Path) -> nn.Module:
    return Smoothed(_cnn(file, folder), file.header["config"]["sigma"], file.header["config"]["samples"])


def _nearest_neighbor(file: WeightFile, folder: Path) -> nn.Module:
    """Tensors "images" (N,C,S,S) uint8 and "labels" (N,)."""
    return NearestNeighbor(file.tensors["images"].float() / 255, file.tensors["labels"].long())


_BUILDERS: dict[str, Callable[[WeightFile, Path], nn.Module]] = {
    "abs": _abs,
    "binary-abs": _binary_abs,
    "cnn": _cnn,
    "binary-cnn": _cnn,
    "transfer-cnn": _cnn,
    "madry": _madry,
    "nearest-neighbor": _nearest_neighbor,
    "prototype-abs": _prototype_abs,
    "saturating-abs": _saturating_abs,
    "saturating-prototype-abs": _saturating_prototype_abs,
    "l2-adversarial": _madry,
    "msd": _madry,
    "smoothed-cnn": _smoothed_cnn,
}
