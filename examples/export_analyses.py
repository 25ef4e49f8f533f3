"""How every class explains some digits, as a Parquet file that pandas, Polars, DuckDB or R reads."""

import pandas

import absynth
from absynth.export import analyses_frame, save

images, labels = absynth.data.load("mnist", "test")
model = absynth.load("abs")
analysis = model.analyze(images[:8])

path = save(analyses_frame(analysis, labels[:8], pixels=True), "analyses.parquet")

frame = pandas.read_parquet(path)
best = frame.loc[frame.groupby("image")["energy"].idxmin()]
print(best[["image", "label", "class", "energy", "probability"]].to_string(index=False))
