"""Foolbox attacks an ABS model as it is: a plain module, logits out, the exact input gradient in."""

import foolbox
import torch

import absynth

images, labels = absynth.data.load("mnist", "test")
images, labels = images[:4], labels[:4]
model = absynth.load("abs")

target = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
attack = foolbox.attacks.L2DeepFoolAttack(steps=20)
_, adversarials, found = attack(target, images, labels, epsilons=None)

distances = (adversarials - images).flatten(1).norm(dim=1)
with torch.no_grad():
    called = model(adversarials).argmax(1)
for label, name, distance, success in zip(labels, called, distances, found, strict=True):
    print(f"{label} called {name} at L2 distance {distance:.2f}" if success else f"{label} holds")
