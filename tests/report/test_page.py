"""The page shows the content of a run directory, names what is missing, and is self-contained."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from igpt.data.images.grid import image_grid
from igpt.data.images.palette import Palette
from igpt.errors import InputError
from igpt.report.page import write_report
from igpt.report.run_comparison import write_comparison

PALETTE = Palette.from_centers(np.linspace(-1, 1, 17)[:, None].repeat(3, 1))
VOID = {"meta", "img", "source", "link", "br", "hr", "input", "base"}


class Page(HTMLParser):
    """Collect elements and text, and check that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(path):
    return Page(path.read_text("utf-8"))


def probe_record(**changes):
    def layers(*accuracies):
        return [
            {
                "layer": i,
                "validation_accuracy": p,
                "test_accuracy": p,
                "regularisation": 0.1,
                "converged": i != 2,
            }
            for i, p in enumerate(accuracies)
        ]

    record = {
        "format": "igpt-probe",
        "version": 2,
        "classes": 10,
        "images": {"train": 1437, "validation": 180, "test": 180},
        "layers": layers(0.90, 0.961, 0.93),
        "best_layer": 1,
        "baselines": {
            "raw_pixels": {"validation_accuracy": 0.94, "test_accuracy": 0.951},
            "untrained": {"layers": layers(0.80, 0.71, 0.70), "best_layer": 0},
        },
    }
    return {**record, **changes}


@pytest.fixture
def bare(tmp_path):
    """Return a run directory with the required files only."""
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    run.joinpath("config.yaml").write_text(
        f"tokens: {tmp_path / 'tokens'}\nbatch_size: 128\nsteps: 200\nlearning_rate: 0.001\nseed: "
        "0\n"
        "n_layer: 2\nn_head: 2\nn_embd: 32\nobjective: autoregressive\npatience: null\n"
    )
    records = [
        {
            "kind": "start",
            "step": 0,
            "parameters": 27_500,
            "train_images": 1437,
            "validation_images": 180,
            "places": 64,
        }
        | {"n_colors": 17, "uniform_loss": math.log(17), "unigram_loss": 2.08},
        {"kind": "train", "step": 50, "loss": 1.71, "learning_rate": 0.001},
        {"kind": "validation", "step": 100, "loss": 1.55, "best": True},
        {"kind": "train", "step": 150, "loss": 1.46, "learning_rate": 0.001},
        {"kind": "validation", "step": 200, "loss": 1.432, "best": True},
        {"kind": "end", "step": 200, "best_step": 200, "best": 1.432, "seconds": 81.0},
    ]
    run.joinpath("metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    return run


@pytest.fixture
def whole(bare, tmp_path):
    """Return a run directory with all files, and its token data set."""
    (tmp_path / "tokens").mkdir()
    manifest = {
        "source": "digits",
        "class_names": ["zero", "one"],
        "splits": {"train": {"count": 1437, "shards": []}, "test": {"count": 180, "shards": []}},
    }
    (tmp_path / "tokens" / "dataset.json").write_text(json.dumps(manifest))
    (bare / "environment.json").write_text(
        json.dumps(
            {
                "igpt": "0.1.0",
                "cores": 2,
                "device": "cpu",
                "command": "igpt pretrain digits",
                "commit": None,
            }
        )
    )
    (bare / "model").mkdir()
    (bare / "model" / "preprocessor_config.json").write_text(
        json.dumps({"clusters": PALETTE.centers_.tolist()})
    )
    (bare / "probe.json").write_text(json.dumps(probe_record()))
    pictures = [[np.full((8, 8, 3), 10 * i + j, np.uint8) for j in range(5)] for i in range(4)]
    image_grid([*pictures, pictures[0][:2]]).save(bare / "samples.png")
    image_grid(pictures).save(bare / "completions.png")
    how = {
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "seed": 0,
        "command": "igpt sample runs/first/model",
    }
    (bare / "samples.json").write_text(json.dumps(how))
    (bare / "completions.json").write_text(json.dumps({**how, "keep_rows": 4}))
    return bare


def test_the_page_is_self_contained(whole):
    path = write_report(whole)
    assert path == whole / "report.html"
    page = read(path)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            assert re.match(
                r"data:image/(png|svg\+xml);base64,[\w+/=]+$",
                attributes.get(name) or "data:image/png;base64,A",
            )
        assert not [name for name in attributes if name.startswith("on")]
    style = path.read_text("utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert {child.name for child in whole.iterdir() if child.name.startswith(".")} == set()


def test_every_picture_has_a_text_alternative(whole):
    images = read(write_report(whole)).all("img")
    assert len(images) == 5
    assert all(len(image["alt"]) > 20 for image in images)
    assert "lowest validation loss is 1.432 at step 200" in images[0]["alt"]
    assert "layer 1 96.1" in images[1]["alt"]


def test_figures_have_both_widths_and_both_colour_schemes(whole):
    sources = read(write_report(whole)).all("source")
    assert len(sources) == 6
    assert len({source["srcset"] for source in sources}) == 6
    assert "(prefers-color-scheme: dark)" in {source["media"] for source in sources}


def test_the_numbers_are_shown(whole):
    text = read(write_report(whole)).text
    for expected in (
        "Image GPT trained on digits",
        "2 layers, width 32, 2 heads, 27.5 k parameters",
        "1.432 2.066",  # nats, bits
        "Colour frequencies alone 2.080 3.001",
        "Uniform distribution over colours 2.833 4.087",
        "This model, layer 1 96.1 % ± 1.4",
        "Untrained network, layer 0 80.0 % ± 3.0",
        "Raw pixels 95.1 % ± 1.6",
        "not significantly better",
        "16.1 points above the best layer of an untrained network",
        "fitted to 1,437 training images",
        "did not converge at layer 2",
        "4 images, one per row",
        "the upper 4 of 8 pixel rows",
        "3 completions by the model (temperature 1.0, no top-k or nucleus cut, seed 0)",
        "22 images sampled from the model unconditionally (temperature 1.0,",
        "igpt sample runs/first/model",
        "on 180 validation images",
        "The 17 colours",
        PALETTE.fingerprint,
        "Finished: 200 steps of 128 images in 1 min 21 s.",
        "zero, one",
        "learning_rate 0.001",
        "n_embd 32",
        "patience none",
        "commit none",
    ):
        assert expected in text, expected


def test_the_same_run_gives_the_same_page(whole):
    before = write_report(whole).read_bytes()
    assert write_report(whole).read_bytes() == before


def test_missing_results_are_named_with_the_command_that_makes_them(bare):
    page = read(write_report(bare))
    for command in ("igpt probe", "igpt complete", "igpt sample", "igpt pretrain", "igpt prepare"):
        assert command in page.text
    assert len(page.all("img")) == 1
    assert {"class": "absent"} in page.all("p")
    assert "Linear probe, " not in page.text


def test_left_out_images_and_warnings_are_shown(whole, tmp_path):
    path = tmp_path / "tokens" / "dataset.json"
    manifest = json.loads(path.read_text())
    assert "left out" not in read(write_report(whole)).text
    frames = {"count": 80, "first": "train /home/x.tif", "possible_images": False}
    manifest["made"] = {
        "left_out": {"further frames of images": frames},
        "warnings": ["nearly black"],
    }
    path.write_text(json.dumps(manifest))
    text = read(write_report(whole)).text
    assert "left out further frames of images: 80 (first: train x.tif)" in text
    assert "warning nearly black" in text
    manifest["made"]["warnings"] = "nearly black"
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"dataset\.json: made\.warnings = 'nearly black'"):
        write_report(whole)


def test_before_the_first_validation_the_model_has_no_loss_to_compare(bare):
    lines = (bare / "metrics.jsonl").read_text().splitlines()
    (bare / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    assert (
        "This model not measured yet not measured yet Colour frequencies alone 2.080"
        in read(write_report(bare)).text
    )


def test_nothing_is_stated_about_the_sampling_of_grids_without_a_record(whole):
    (whole / "samples.json").unlink()
    (whole / "completions.json").unlink()
    text = read(write_report(whole)).text
    assert "temperature" not in text
    assert "the original, the given pixels, and 3 completions" in text


def test_a_grid_of_another_layout_gets_no_count(whole):
    image_grid([[np.zeros((8, 8, 3), np.uint8)] * 3], scale=3).save(whole / "samples.png")
    assert "Images sampled from the model unconditionally" in read(write_report(whole)).text


def test_a_skipped_probe_gives_its_reason(whole):
    record = {"format": "igpt-probe", "version": 2, "skipped": "the images have no labels"}
    (whole / "probe.json").write_text(json.dumps(record))
    text = read(write_report(whole)).text
    assert "The probe was skipped: the images have no labels" in text
    assert "Linear probe: best layer" not in text


def test_every_protocol_of_a_probe_is_described(whole):
    record = probe_record(
        config={"fold_back": True},
        concatenated={"layers": [0, 1], "validation_accuracy": 0.9, "test_accuracy": 0.912},
        few_labels=[
            {
                "per_class": 4,
                "layer": 1,
                "mean": 0.732,
                "standard_deviation": 0.015,
                "test_accuracies": [0.7] * 5,
            }
        ],
    )
    (whole / "probe.json").write_text(json.dumps(record))
    text = read(write_report(whole)).text
    again = "With the selected regularization strength, it is fitted again to the images of both"
    assert f"on 180 validation images. {again} splits. The test accuracy is measured on 180" in text
    assert "Layers 0, 1 concatenated: test accuracy 91.2 %." in text
    assert (
        "4 labels per class, layer 1: test accuracy 73.2 %, standard deviation 1.5 points over 5 "
        "label subsets." in text
    )
    layers = [{**row, "learning_rate": 3.0} for row in record["layers"]]
    (whole / "probe.json").write_text(json.dumps({**record, "config": {}, "layers": layers}))
    text = read(write_report(whole)).text
    assert "The learning rate of SGD and the layer (ring) are selected by the accuracy on" in text
    assert "on 180 validation images. The test accuracy is measured on 180" in text


def test_a_probe_without_baselines(whole):
    (whole / "probe.json").write_text(json.dumps(probe_record(baselines={})))
    assert "It was not compared with raw pixels" in read(write_report(whole)).text


def test_the_page_of_a_fine_tuning_run(bare):
    bare.joinpath("config.yaml").write_text(
        "model: runs/first/model\ntokens: gone\ngeneration_weight: 1.0\nsteps: 500\n"
    )
    records = [
        {
            "kind": "start",
            "step": 0,
            "source": "digits",
            "train_images": 1437,
            "validation_images": 180,
            "classes": 10,
        },
        {"kind": "train", "step": 50, "loss": 3.2},
        {"kind": "validation", "step": 50, "error": 0.1, "best": True},
        {"kind": "validation", "step": 100, "error": 0.05, "best": True},
        {"kind": "end", "step": 100, "best": 0.05, "best_step": 100, "seconds": 3.0},
    ]
    bare.joinpath("metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    bare.joinpath("test.json").write_text(
        json.dumps(
            {"format": "igpt-finetune", "version": 1, "test_accuracy": 0.93, "test_images": 180}
        )
    )
    page = read(write_report(bare))
    for expected in (
        "Image GPT fine-tuned on digits",
        "fine-tuned with labels on 1,437 images, for 10 classes",
        "Test accuracy 93.0 % on 180 images (standard error 1.9 points)",
        "stopped early (at most 500)",
        "Accuracy on 180 validation images",
    ):
        assert expected in page.text, expected
    assert "without labels" not in page.text
    assert "igpt probe" not in page.text
    assert len(page.all("img")) == 2


def test_confused_classes_are_shown(whole):
    counts = np.diag([18] * 10)
    counts[3, 8], counts[3, 3] = 5, 13
    record = probe_record(class_names=[f"d{number}" for number in range(10)])
    (whole / "probe.json").write_text(json.dumps({**record, "confusion": counts.tolist()}))
    page = read(write_report(whole))
    assert "Classes confused" in page.text
    assert "d3 18 72.2 % d8 (5)" in page.text
    for wrong in (counts[:9], counts[:, :9], [[-1] * 10] * 10):
        table = np.asarray(wrong).tolist()
        (whole / "probe.json").write_text(json.dumps({**record, "confusion": table}))
        with pytest.raises(InputError, match="confusion"):
            write_report(whole)


def test_scores_and_learning_rates_are_tabulated(bare):
    score = {"format": "igpt-score", "version": 1, "images": 7, "nats_per_pixel": 1.25}
    score |= {"split": "test", "source": "/home/me/photos", "standard_error": 0.5}
    score["maps"] = {"file": "gone/losses.png", "rows": [0, 4], "sha256": "0" * 64}
    (bare / "score-photos.json").write_text(json.dumps(score))
    rates = [
        {"learning_rate": 0.1, "validation_accuracy": None, "best_step": 0},
        {"learning_rate": 0.01, "validation_accuracy": 0.5, "best_step": 8},
    ]
    test = {"format": "igpt-finetune", "version": 1, "test_accuracy": 0.5, "test_images": 4}
    (bare / "test.json").write_text(json.dumps({**test, "rates": rates, "learning_rate": 0.01}))
    page = read(write_report(bare))
    assert "photos, test: 7 images 1.2500 \u00b1 0.5000" in page.text
    assert "0.01 (selected) 50.0 % 8 0.1 diverged" in page.text
    assert "losses.png is no longer where it was written" in page.text


def quality_record() -> dict[str, Any]:
    """Return a `quality.json` as `igpt quality` writes it."""
    frechet = {"distance": 0.5, "interval_95": [0.25, 0.75], "images": [500, 480]}
    completions = {"mean": 0.2, "interval_95": [0.15, 0.25], "count": 90, "keep_rows": 4}
    return {
        "format": "igpt-quality",
        "version": 1,
        "model": "runs/first",
        "features": "runs/first",
        "layer": 2,
        "source": "/home/me/photos",
        "frechet": frechet,
        "completions": {**completions, "other_pixels": {"mean": 0.3}},
    }


def test_the_quality_of_samples_is_tabulated(bare):
    (bare / "quality.json").write_text(json.dumps(quality_record()))
    page = read(write_report(bare))
    assert "Frechet distance of samples to photos in layer 2 of this model" in page.text
    assert "500 samples, 480 images 0.5 0.25 to 0.75" in page.text
    assert "90 completions of 4 rows 20.0 % 15.0 % to 25.0 %" in page.text
    assert "The rows with another image's below them 30.0 %" in page.text
    other = {**quality_record(), "features": "/home/me/judge", "completions": None}
    (bare / "quality.json").write_text(json.dumps(other))
    page = read(write_report(bare))
    assert "photos in layer 2 of judge (lower is better)" in page.text
    assert "completions of 4 rows" not in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is not igpt-quality of format version 1; `igpt quality` writes it again"),
        ({"frechet": {"distance": "far"}}, "distance"),
        ({"layer": -1}, "layer"),
    ],
)
def test_damaged_qualities_are_refused(bare, change, message):
    (bare / "quality.json").write_text(json.dumps(quality_record() | change))
    with pytest.raises(InputError, match=message):
        write_report(bare)


def test_runs_are_compared(whole, tmp_path):
    other = tmp_path / "other" / "first"
    shutil.copytree(whole, other)
    config = (whole / "config.yaml").read_text().replace("0.001", "0.004")
    (other / "config.yaml").write_text(config.replace("patience: null", "patience: 3"))
    layers = probe_record()["layers"][:2]
    (other / "probe.json").write_text(json.dumps(probe_record(layers=layers)))
    page = read(write_comparison([whole, other], tmp_path / "both.html"))
    for expected in (
        "setting runs/first other/first learning_rate 0.001 0.004 patience none 3",
        "lowest validation loss, nats/pixel 1.4320 (step 200) 1.4320 (step 200)",
        "linear probe, test accuracy 96.1 % \u00b1 1.4, layer 1",
        "100 1.5500 1.5500 200 1.4320 1.4320",
        "0 90.0 90.0 1 96.1 96.1 2 93.0 \u2013",
    ):
        assert expected in page.text, expected
    assert "batch_size" not in page.text
    assert len(page.all("img")) == 2
    started = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    lines = [started, {"kind": "validation", "step": 50, "error": 0.25}]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (other / "environment.json").write_text('{"kind": "finetune"}')
    page = read(write_comparison([whole, other], tmp_path / "both.html"))
    assert "best validation accuracy \u2013 75.0 % (step 50)" in page.text
    assert "No loss is recorded yet." in page.text


def test_runs_that_cannot_be_compared_are_refused(igpt, bare, tmp_path):
    again, missing = bare.parent / ".." / "runs" / "first", tmp_path / "missing"
    out = ("-o", tmp_path / "x.html")
    for words, said in (
        ((bare, again, *out), f"{again} is given twice; name different runs to compare them"),
        ((bare, tmp_path, *out), f"{tmp_path} is no run directory: config.yaml is missing"),
        ((bare, *[missing] * 4, *out), "a page compares 2 to 4 runs, not 5"),
        ((bare, missing, "-o", tmp_path / "x.png"), "is written as .html, not as x.png"),
        ((bare, *out), f"the page of one run is {bare}/report.html"),
    ):
        done = igpt("report", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert said in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_absolute_paths_are_not_shown(whole, tmp_path):
    for file, changes in (
        ("config.yaml", "tokens: /home/me/tokens\nmodel: /home/me/runs/old\n"),
        (
            "environment.json",
            json.dumps({"command": "igpt pretrain /home/me/tokens -o '/home/x/r'"}),
        ),
    ):
        (whole / file).write_text(changes)
    text = write_report(whole).read_text()
    assert "/home" not in text
    assert "igpt pretrain tokens -o" in read(whole / "report.html").text


def test_metrics_truncated_at_any_byte_give_a_page(bare):
    path = bare / "metrics.jsonl"
    content = path.read_bytes()
    for end in (0, 7, content.index(b"1.71") + 2, content.index(b"1.432") + 3):
        path.write_bytes(content[:end])
        assert "Not finished" in read(write_report(bare)).text


def test_a_run_without_any_loss_has_no_figure(bare):
    first = (bare / "metrics.jsonl").read_text().splitlines()[0]
    (bare / "metrics.jsonl").write_text(first + "\n")
    page = read(write_report(bare))
    assert "No loss is recorded yet" in page.text
    assert page.all("img") == []


def test_text_from_files_is_escaped(whole, tmp_path):
    evil = '<script>alert("1")</script><img src=x onerror=y>'
    manifest = {"source": evil, "class_names": [evil, "one"], "splits": {"train": {"count": 3}}}
    (tmp_path / "tokens" / "dataset.json").write_text(json.dumps(manifest))
    (whole / "environment.json").write_text(json.dumps({"igpt": evil, "command": evil}))
    (whole / "samples.json").write_text(json.dumps({"temperature": 0.5, "command": evil}))
    (whole / "probe.json").write_text(
        json.dumps({"format": "igpt-probe", "version": 2, "skipped": f"`{evil}`"})
    )
    path = write_report(whole)
    page = read(path)
    assert page.all("script") == []
    assert all("onerror" not in image for image in page.all("img"))
    assert "<script>" not in path.read_text("utf-8")
    assert page.text.count('alert("1")') >= 5


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_other_directories_are_refused(bare, name):
    (bare / name).unlink()
    with pytest.raises(InputError, match=rf"no run directory: {name} is missing; `igpt pretrain`"):
        write_report(bare)
    assert not (bare / "report.html").exists()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run directory"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("probe.json", '{"format": "igpt-probe", "version": 1}', "format version 2"),
        ("probe.json", '{"format": "igpt-probe", "version": 2}', "the key 'layers' is missing"),
        (
            "probe.json",
            json.dumps(probe_record(best_layer=9)),
            "best_layer = 9: that layer is not among the layers",
        ),
        (
            "probe.json",
            json.dumps(probe_record(classes="ten")),
            "classes = 'ten': Input should be a valid integer",
        ),
        ("probe.json", '{"form', "cut off"),
        ("samples.png", "text", "not a readable PNG"),
        ("config.yaml", "- a\n- b\n", "name: value"),
    ],
)
def test_damaged_files_are_named_and_the_old_page_is_kept(whole, name, content, message):
    before = write_report(whole).read_bytes()
    (whole / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        write_report(whole)
    assert name in str(caught.value)
    assert (whole / "report.html").read_bytes() == before


def test_importing_needs_neither_torch_nor_matplotlib():
    code = (
        "import igpt.report.page, sys; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
