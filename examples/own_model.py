"""Your own model, evaluated: any module that takes images (N,C,H,W) in [0,1] to logits."""

import torch
from torch import nn

import absynth
from absynth.evaluation import evaluate, report, verify

# A model of yours: here a linear one, trained for a moment on the digits that come with the package.
images, labels = absynth.data.load("digits", "train")
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

model.eval()

# The evaluation, in five lines:
summary = evaluate(model, "digits", suite="deepfool-l2,gaussian-noise-l2", images=20, out="runs/mine", name="mine")
print(f"clean accuracy {summary['mine'].clean_accuracy:.0%}")
print(f"median L2 distance of the nearest adversarial {summary['mine'].norms['l2'].all.median:.2f}")
print(report("runs/mine").html)
assert verify("runs/mine", models={"mine": model}).holds
