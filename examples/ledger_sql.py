"""A run's ledger is one SQLite file with plain tables: any SQL tool reads it. Schema: docs/interoperability.md."""

import sqlite3
import zlib
from contextlib import closing

import numpy as np

from absynth.evaluation import evaluate

evaluate("cnn", "digits", suite="deepfool-l2,gaussian-noise-l2", images=10, out="runs/cnn")

with closing(sqlite3.connect("file:runs/cnn/ledger.sqlite?mode=ro", uri=True)) as ledger:
    for line in ledger.execute(
        """
        SELECT models.name, attacks.name, count(*), sum(rows.found), min(rows.distance)
        FROM rows JOIN models ON models.digest = rows.model JOIN attacks USING (attack)
        WHERE rows.status <> 'error'
        GROUP BY models.name, attacks.name ORDER BY 5
        """
    ):
        print("{} under {}: {} images, {} broken, nearest at {:.3f}".format(*line))

    # An image, rebuilt from its blob, and its distance recomputed without absynth
    adversarial, clean, shape, distance = ledger.execute(
        """
        SELECT rows.adversarial, images.pixels, images.shape, rows.distance FROM rows JOIN images USING (image)
        WHERE rows.status = 'found' ORDER BY rows.distance LIMIT 1
        """
    ).fetchone()
first, second = (
    np.frombuffer(zlib.decompress(blob), "<f4").reshape(*map(int, shape.split("x"))).astype("f8")
    for blob in (adversarial, clean)
)
print(f"L2 again: {np.linalg.norm((first - second).ravel()):.6f}, in the ledger: {distance:.6f}")
