"""One training: what was asked for, its data, its place on disk, and how it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absynth import data, weight_files
from absynth.errors import InputError
from absynth.training.checkpoint import load_checkpoint
from absynth.training.classifiers import Progress


class Run:
    """One training: its data, its place on disk, and how it reports."""

    def __init__(
        self,
        name: str,
        dataset: str | Path,
        out: str | Path,
        seed: int,
        root: str | Path | None,
        progress: Progress | None,
        device: str | torch.device = "cpu",
        effort: float = 1.0,
    ) -> None:
        self.device, self.effort = torch.device(device), effort
        self.name, self.dataset, self.out, self.seed, self.progress = name, dataset, Path(out), seed, progress
        images, labels = data.load(dataset, "train", root)
        self.test = data.load(dataset, "test", root)
        self.classes = int(labels.max()) + 1
        self.data_digest = data.digest(images, labels)
        held_out = min(5000, len(images) // 6)
        self.train, self.held_out = data.holdout(images, labels, held_out, seed=0)

    def placed(self, split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Images and labels on the device of the training."""
        return split[0].to(self.device), split[1].to(self.device)

    @property
    def checkpoints(self) -> Path:
        return self.out / f"{self.name}.training"

    def header(self, config: dict[str, Any], clean: float, **more: Any) -> dict[str, Any]:
        command = f"absynth train {self.name} --data {self.dataset} --seed {self.seed}"
        command += "" if self.effort == 1 else f" --effort {self.effort:g}"
        return {
            "model": self.name, "config": config, **self.settings(), "accuracy": clean,
            "command": command if self.device.type == "cpu" else f"{command} --device {self.device}",
            **more,
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What was asked for, as the header of the weight file says it."""
        return {
            "data": str(self.dataset), "data_digest": self.data_digest, "seed": self.seed, "effort": float(self.effort),
        }  # fmt: skip

    def check_replaces(self, path: Path) -> None:
        """Raise InputError where the weights at ``path`` were trained otherwise: hours of work are not replaced."""
        if not path.exists():
            return
        try:
            there = weight_files.read(path).header
        except InputError:  # damaged: good for nothing but to be made anew
            return
        wanted = self.settings()
        for key, shown in (("data_digest", "data"), ("seed", "seed"), ("effort", "effort")):
            if key in there and there[key] != wanted[key]:  # files of before know no effort
                raise InputError(
                    f"{path} holds weights trained with {shown} {there[shown]}, this training has {shown} "
                    f"{wanted[shown]}: give another folder, or remove that file"
                )

    def check_same_data(self, path: Path) -> None:
        """Raise InputError where the weights at ``path``, which this training begins with, are of other data: they may
        have been trained on what is held out here."""
        there = weight_files.read(path).header
        if there.get("data_digest", self.data_digest) != self.data_digest:
            raise InputError(
                f"{path} holds weights trained on {there.get('data')}, and {self.name} on {self.dataset} would begin "
                "with them: give another folder"
            )


def what_goes_on(name: str, out: str | Path) -> str:
    """A line about the latest checkpoint of a training that was stopped; empty where there is none."""
    found = sorted((Path(out) / f"{name}.training").glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    saved = load_checkpoint(found[-1]) if found else None
    if saved is None:
        return ""
    places = {"step": "step", "epoch": "epoch", "epochs_done": "epoch", "round": "round"}
    reached = next((f" ({shown} {saved[1][key]})" for key, shown in places.items() if key in saved[1]), "")
    return f"going on from {found[-1]}{reached}"
