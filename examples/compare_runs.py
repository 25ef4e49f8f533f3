"""Two saved runs, compared on the images both have: here one attack with few and with more steps."""

from absynth.attacks.gradient import DeepFool
from absynth.evaluation import compare, evaluate
from absynth.norms import L2

for steps in (1, 20):
    evaluate("cnn", "mnist", suite=[DeepFool(L2, steps=steps)], images=20, out=f"runs/{steps}-steps")

for one in compare("runs/1-steps", "runs/20-steps"):  # the same on the command line: absynth compare RUN1 RUN2
    print(
        f"{one.model}, {one.attack}: median {one.medians[0]:.3g} → {one.medians[1]:.3g}, "
        f"nearer on {one.nearer} of {one.images} images, farther on {one.farther}, p = {one.p_value:.2g}"
    )
