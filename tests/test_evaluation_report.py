"""The report, the published figures and distal images."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import evaluation_models as models
from absynth.attacks.binary import Thresholded
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.catalog import ATTACKS
from absynth.attacks.gradient import DeepFool
from absynth.data import digest
from absynth.errors import InputError
from absynth.evaluation import Certificate, Ledger, distal, evaluate, load_distal, report, save_distal, summarize
from absynth.evaluation.doubts import with_half_steps
from absynth.evaluation.figures import accuracy_curves, adversarials, curve, to_png, to_svg
from absynth.evaluation.ledger import FILE_NAME
from absynth.evaluation.paper import (
    DATA_DIGEST,
    MODELS,
    is_papers_data,
    paper_attacks,
    published,
    published_clean,
    published_curve,
)
from absynth.evaluation.probed import unprobed
from absynth.evaluation.rows import AttackRecord, Row
from absynth.evaluation.summary import Summary, summarize_model
from absynth.evaluation.tables import cost, markdown_table, number, percent
from absynth.norms import L0, L2, LINF
from absynth.responses import Ramp
from evaluation_models import Linear, labeled

SUITE = (BoundaryProjection(L2), DeepFool(L2), BoundaryProjection(LINF), BoundaryProjection(L0))


class Page(HTMLParser):
    """Collects the text of the tables' cells, the addresses and the names of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' runs, a certificate, distal images and the report. Read only."""
    folder = tmp_path_factory.mktemp("reported")
    net, other = models.Linear(), models.Linear(seed=4)
    data = models.labeled(net)
    evaluate(net, data, suite=SUITE, images=8, out=folder / "abs", name="abs", probe=False)
    evaluate(other, data, suite=SUITE[1:], images=8, out=folder / "own", name="my <model> & co", probe=False)
    for run in ("abs", "own"):  # as if of MNIST's test split: the paper has no figures for other data
        with closing(sqlite3.connect(folder / run / FILE_NAME)) as connection, connection:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'data_digest'", (DATA_DIGEST,))
    model = summarize(folder)["abs"]
    with Ledger(folder / "abs", write=True) as ledger:
        radii = [0.5 * d for d in model.norms["l2"].all.distances.values()]
        ledger.add_certificates(
            [Certificate(model.digest, i, "l2", r, "half", "exact", 0) for i, r in enumerate(radii)]
        )
    save_distal(folder, {"abs": distal(net, 1, count=2, shape=(1, 8, 8), steps=5)})
    files = report(folder)
    assert files.html == folder / "report.html"
    return folder


def test_the_page_opens_offline(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    # Nothing else is fetched: the only addresses left are names of SVG's namespaces and of the license of a schema.
    fetched = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?\s*https?:", text.replace("xmlns", ""))
    assert fetched == [] and "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("svg") == 3 and page.tags.count("img") == 4  # curves; adversarials a norm, distal images
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "currentColor" in text


def test_the_page_says_what_the_summary_says(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert "my &lt;model&gt; &amp; co" in text and "<model>" not in text
    words = " ".join(Page(text).text)
    cell = summarize(reported)["abs"].norms["l2"].attacks["deepfool-l2"]
    assert f"{number(cell.median)} · {percent(cell.accuracy)}" in words
    assert "2.24 · 80 %" in words  # the paper's ABS, all L2 attacks
    assert "absynth verify" in words and "union of the balls" in words and "half" in words
    for title in ("At a glance", "Warnings", "Which attack won", "Queries and time", "Certificates", "Distal images"):
        assert title in words


def test_the_csv_has_the_raw_numbers(reported: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((reported / "report.csv").read_text(encoding="utf-8"))))
    cell = summarize(reported)["abs"].norms["l2"].all
    (row,) = [row for row in rows if (row["model"], row["norm"], row["attack"]) == ("abs", "l2", "all")]
    assert float(row["median"]) == cell.median and float(row["accuracy"]) == cell.accuracy
    assert (row["paper_median"], row["paper_accuracy"], row["threshold"]) == ("2.24", "0.8", "1.5")
    assert {row["attack"] for row in rows if row["norm"] == "union"} == {"all"}
    assert len(rows) == 4 + 3 + 3 + 3 + 2 + 1  # attacks, all of a norm, unions, the certificate
    (certificate,) = [row for row in rows if row["certificate"]]
    assert (certificate["norm"], certificate["attack"], certificate["kind"]) == ("l2", "", "exact")
    assert float(certificate["median"]) == pytest.approx(cell.median / 2) and certificate["images"] == "8"


def test_the_markdown_has_the_tables(reported: Path) -> None:
    text = (reported / "report.md").read_text(encoding="utf-8")
    cell = summarize(reported)["abs"].norms["linf"].all
    assert f"{number(cell.median)} · {percent(cell.accuracy)}" in text
    assert "| all attacks |" in text and "[2.24 · 80 %]" in text and "## Warnings" in text
    assert "Not looked for: ABS, my <model> & co. `absynth evaluate`" in text  # no probes in these runs
    assert "None of what was tried" not in text and "| ABS | L2 | half | exact | 8 |" in text


def test_reports_go_where_they_are_sent(reported: Path, tmp_path: Path) -> None:
    files = report(reported / "own", out=tmp_path / "new")
    assert files.csv == tmp_path / "new" / "report.csv" and files.csv.is_file()
    assert not (reported / "own" / "report.csv").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a writable folder"):
        report(reported / "own", out=tmp_path / "file")
    with pytest.raises(InputError, match="no evaluation in"):
        report(tmp_path / "new")


def test_runs_on_different_data_are_not_mixed(reported: Path, tmp_path: Path) -> None:
    net = models.Linear()
    evaluate(net, models.labeled(net, wrong=1), suite="none", images=2, out=tmp_path, probe=False)
    with pytest.raises(InputError, match="different data"):
        report(reported, tmp_path, out=tmp_path)


def test_the_curve_is_the_share_of_survivors() -> None:
    points, accuracy = curve([0.0, 1.0, 1.0, math.inf], 4.0)
    assert points.tolist() == [0.0, 1.0, 4.0] and accuracy.tolist() == [75.0, 25.0, 25.0]


def test_numbers_of_four_digits_are_written_out() -> None:
    assert [number(value) for value in (0.0123456, 1.5, 999.4, 999.6, 4321.5)] == [
        "0.0123",
        "1.5",
        "999",
        "1,000",
        "4,322",
    ]
    assert [number(value) for value in (math.inf, math.nan)] == ["∞", "–"]
    attack = AttackRecord("A", "a-l2", "l2", "gradient", "minimum")
    found = [Row("m", "A", "l2", 0, 0, 0, 1.0, "found", seconds=123.4)]
    model = summarize_model("a|b", "m", [], found, {"A": attack}, {})
    (row,) = cost(Summary((model,), {}), ["l2"])["rows"]
    assert row["cells"][0].interval == "123 s"
    assert markdown_table(["a|b"], [["c|d"]]) == ["| a\\|b |", "|---|", "| c\\|d |"]


def test_published_figures() -> None:
    cell = published("abs", "l2")
    assert cell is not None and (cell.median, cell.accuracy) == (2.24, 0.8)
    noise = published("nearest-neighbor", "l2", "gaussian-noise-l2")
    assert noise is not None and noise.median == math.inf and noise.accuracy == 0.91
    assert published("abs", "l2", "fgm-l2") is None and published("abs", "l1") is None and published("x", "l2") is None
    assert published_clean("nearest-neighbor") == 0.969
    assert len(paper_attacks("l2")) == 11 and len(paper_attacks("linf")) == 9 and len(paper_attacks("l0")) == 2
    for model in MODELS:
        for norm, threshold in {"l2": 1.5, "linf": 0.3, "l0": 12}.items():
            cell, found = published(model, norm), published_curve(model, norm)
            assert cell is not None and found is not None
            distance, accuracy = found
            assert distance == sorted(distance) and all(0 <= a <= 1 for a in accuracy)
            # The table was read off these curves: what is left beyond the threshold.
            left = min(a for d, a in zip(distance, accuracy, strict=True) if d <= threshold)
            assert left == pytest.approx(cell.accuracy, abs=0.021)


def test_figures_have_the_color_of_the_page(reported: Path) -> None:
    svg = to_svg(accuracy_curves(summarize(reported).models, "l2"), "curves")
    assert svg.startswith('<svg role="img" aria-label="curves"') and "currentColor" in svg and "#0a0b0c" not in svg
    assert svg == to_svg(accuracy_curves(summarize(reported).models, "l2"), "curves")


def test_no_name_is_cut_off_at_the_edge_of_a_figure(tmp_path: Path) -> None:
    net = models.Linear()
    names = [f"classifier no. {number:03d}" for number in range(7)]
    for name in names:
        evaluate(net, models.labeled(net), suite=[DeepFool(L2)], images=8, out=tmp_path / name, name=name, probe=False)
    with Ledger(tmp_path / names[0]) as ledger:
        figure = adversarials(summarize(tmp_path).models, "l2", ledger.images())
    assert figure is not None
    shown = np.asarray(Image.open(io.BytesIO(to_png(figure))).convert("L"))
    assert (shown[:, :2] == 255).all() and (shown[:, -2:] == 255).all() and (shown < 128).any()


def test_the_page_names_every_form_of_an_attack(tmp_path: Path) -> None:
    net = models.Linear()
    plain = BoundaryProjection(L2, steps=3)
    for name, attack in (("abs", plain), ("binary-abs", Thresholded(plain, 0.5))):
        evaluate(net, models.labeled(net), suite=[attack], images=2, out=tmp_path / name, name=name, probe=False)
    text = html.unescape((report(tmp_path).html).read_text(encoding="utf-8"))
    assert f"<code>{plain!r}; {Thresholded(plain, 0.5)!r}</code>" in text


# Distal images


def test_distal_images_reach_the_confidence_and_stay_in_range() -> None:
    net = models.Linear()
    found = distal(net, 2, count=3, shape=(1, 8, 8), steps=500)
    assert (found.confidences > 0.9).all() and ((found.images >= 0) & (found.images <= 1)).all()
    with torch.no_grad():
        assert torch.allclose(torch.softmax(net(found.images), 1)[:, 2], found.confidences, atol=1e-6)
        assert torch.allclose(torch.softmax(net(found.starts), 1)[:, 2], found.start_confidences, atol=1e-6)
    untouched = found.start_confidences > 0.9
    assert (found.steps[untouched] == 0).all() and (found.steps[~untouched] > 0).all()
    alone = distal(net, 2, count=1, shape=(1, 8, 8), steps=500)
    assert torch.equal(alone.starts[0], found.starts[0]) and torch.allclose(alone.images[0], found.images[0], atol=1e-5)


class Flat(models.Linear):
    """Its own probabilities are flat far from what it knows, as those of a generative model are."""

    def forward(self, images: Tensor) -> Tensor:
        patterns = torch.eye(3).repeat_interleave(22, dim=1)[:, :64]
        return -(images.flatten(1)[:, None] - patterns).square().sum(2)

    def probabilities(self, images: Tensor) -> Tensor:
        evidence = torch.exp(440 / 64 * self(images)) + 0.000039
        return evidence / evidence.sum(1, keepdim=True)


def test_distal_images_of_a_model_whose_probabilities_vanish() -> None:
    found = distal(Flat(), 1, count=2, shape=(1, 8, 8), steps=500, learning_rate=0.05)
    assert (found.start_confidences < 0.4).all() and (found.confidences > 0.9).all()


class Behind(Flat):
    """The same behind a ramp, on whose flat parts four of five pixels lie."""

    def __init__(self) -> None:
        super().__init__()
        self.response = Ramp(0.4)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.response(images))


def test_distal_images_behind_a_ramp() -> None:
    """Its flat parts hide the gradient of most pixels; a response that cannot be left again would end in noise."""
    net = Behind()
    found = distal(net, 1, count=2, shape=(1, 8, 8), steps=500, learning_rate=0.05)
    assert (found.start_confidences < 0.4).all() and (found.confidences > 0.9).all() and (found.steps > 0).all()
    assert ((found.images >= 0) & (found.images <= 1)).all()
    assert torch.allclose(net.probabilities(found.images)[:, 1], found.confidences, atol=1e-6)
    untouched = distal(net, 1, count=2, shape=(1, 8, 8), steps=0)
    assert torch.equal(untouched.images, untouched.starts)


def test_distal_images_are_saved_and_read(tmp_path: Path) -> None:
    assert load_distal(tmp_path) == {}
    found = distal(models.Linear(), 0, count=2, shape=(1, 8, 8), steps=0)
    assert torch.equal(found.images, found.starts)
    path = save_distal(tmp_path, {"a": found, "b": found})
    read = load_distal(tmp_path)
    assert list(read) == ["a", "b"] and torch.equal(read["b"].images, found.images)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        load_distal(tmp_path)


def test_distal_images_of_a_class_that_is_not_there() -> None:
    with pytest.raises(InputError, match="class 3 is out of range: the model has 3"):
        distal(models.Linear(), 3, shape=(1, 8, 8))


def test_json_of_a_whole_run_is_strict(reported: Path) -> None:
    json.dumps(summarize(reported).to_json(), allow_nan=False)


def test_distal_images_alone_have_a_report(tmp_path: Path) -> None:
    images = distal(Linear(), 1, count=2, shape=(1, 8, 8), steps=5)
    save_distal(tmp_path / "distal", {"net": images})
    files = report(tmp_path / "distal")
    page, text = files.html.read_text(encoding="utf-8"), files.markdown.read_text(encoding="utf-8")
    assert "nothing was attacked" in page and page.count("<img") == 1 and "<table" not in page
    assert "| net | 1 |" in text and "Distal images alone" in text
    # beside a run, in a folder of their own, they are shown with it
    model = Linear()
    pictures, labels = labeled(model)
    run = tmp_path / "run"
    evaluate(model, (pictures, labels), suite="fgm-l2", norms=("l2",), images=3, out=run, name="net", probe=False)
    files = report(run, tmp_path / "distal")
    assert "Distal images" in files.html.read_text(encoding="utf-8") and "## L2" in files.markdown.read_text("utf-8")
    with pytest.raises(InputError, match="no evaluation in"):
        report(tmp_path / "nothing")


def test_no_warning_is_about_what_was_tried_and_says_so(tmp_path: Path) -> None:
    model = Linear()
    data = labeled(model)
    evaluate(model, data, suite="boundary-projection-l2", norms=("l2",), images=8, out=tmp_path, name="net")
    files = report(tmp_path)
    for file in (files.html, files.markdown):
        assert "None of what was tried, attacks in L2:" in file.read_text(encoding="utf-8")


def test_the_report_says_what_was_not_tried(tmp_path: Path) -> None:
    model, data = Linear(), labeled(Linear())

    def said() -> str:
        return report(tmp_path).markdown.read_text(encoding="utf-8")

    evaluate(model, data, suite="none", images=8, out=tmp_path, name="net")
    assert "\n\n## Warnings\n\nNone of what was tried: gradients and answers gave no reason to mistrust the" in said()
    evaluate(model, data, suite=[DeepFool(L2)], images=2, out=tmp_path, name="net")
    assert "attacks in L2: gradients and answers" in said() and "Not looked for" not in said()  # both images are wrong
    attacks = [BoundaryProjection(L2), DeepFool(L2)]
    evaluate(model, data, suite=attacks, norms=("l2",), images=8, out=tmp_path, name="net", probe=False)
    kinds = [f"{kind} of boundary-projection-l2 and deepfool-l2" for kind in ("planted adversarials", "steps")]
    assert f"Not looked for: net ({'; '.join(kinds)}). `absynth evaluate`" in said()
    assert "attacks in L2: gradients and answers gave no reason" in said()
    evaluate(model, data, suite=attacks[:1], norms=("l2",), images=8, out=tmp_path, name="net")
    assert "Not looked for: net (planted adversarials of deepfool-l2; steps of deepfool-l2)" in said()
    evaluate(model, data, suite=attacks, norms=("l2",), images=8, out=tmp_path, name="net")
    assert "Not looked for" not in said()
    assert "attacks in L2: gradients, answers, planted adversarials and steps gave no reason" in said()


def test_the_questions_that_are_missing_are_those_that_an_evaluation_asks() -> None:
    for attack in ATTACKS.values():
        record = AttackRecord(repr(attack), attack.name, str(attack.norm), attack.knowledge, attack.kind)
        expected = {"steps"} if with_half_steps(attack) is not None else set()
        if attack.kind == "minimum" and attack.knowledge == "gradient":
            expected |= {"planted"}
        assert set(unprobed({("model", "")}, [record])) == expected


def test_a_run_of_certificates_alone_has_a_report(tmp_path: Path) -> None:
    evaluate(Linear(), labeled(Linear()), suite="none", images=8, out=tmp_path, name="net", probe=False)
    with Ledger(tmp_path, write=True) as ledger:
        name = ledger.models()[0].digest
        ledger.add_certificates([Certificate(name, i, "l2", 0.5 * i, "half", "exact", 0) for i in range(8)])
    files = report(tmp_path)
    page, text = files.html.read_text(encoding="utf-8"), files.markdown.read_text(encoding="utf-8")
    assert "| net | L2 | half | exact | 8 | 1.75 | 1.75 | 50 % (22–78 %) |" in text and "Warnings" not in text
    assert "8 images each of tensors, all split, not attacked." in page and "Which attack won" not in page
    (row,) = csv.DictReader(io.StringIO(files.csv.read_text(encoding="utf-8")))
    assert (row["certificate"], row["kind"], row["accuracy"], row["mean_radius"]) == ("half", "exact", "0.5", "1.75")


def test_the_papers_figures_are_for_its_data(tmp_path: Path) -> None:
    evaluate(Linear(), labeled(Linear()), suite=[DeepFool(L2)], images=8, out=tmp_path, name="abs", probe=False)
    files = report(tmp_path)
    for file in (files.html, files.markdown):
        assert "paper" not in re.sub("class=.paper|[.]paper", "", file.read_text(encoding="utf-8").split("<body>")[-1])
    assert "2.24" not in files.markdown.read_text(encoding="utf-8")
    assert next(csv.DictReader(io.StringIO(files.csv.read_text(encoding="utf-8"))))["paper_median"] == ""
    one = summarize(tmp_path)["abs"]
    papers = replace(one, paper_name="abs")
    drawn = [["--" in line.get_linestyle() for line in accuracy_curves([m], "l2").axes[0].lines] for m in (one, papers)]
    assert not any(drawn[0]) and any(drawn[1])
    left_out = accuracy_curves([replace(papers, norms={}), one], "l2").axes[0].lines  # it was not attacked
    assert not any("--" in line.get_linestyle() for line in left_out)
    assert is_papers_data({"data": "mnist", "split": "test"}) and not is_papers_data(
        {"data": "mnist", "split": "train"}
    )


def test_the_papers_data_are_known_by_their_digest(mnist_test: tuple[Tensor, Tensor]) -> None:
    assert digest(*mnist_test) == DATA_DIGEST
