"""Figures contain the recorded numbers, and image grids the images."""

import base64
import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest

from igpt.data.images.grid import grid_counts, image_grid
from igpt.errors import InputError
from igpt.report.figures import (
    DARK,
    LIGHT,
    NARROW,
    WIDE,
    accuracy_curve,
    confusion_matrix,
    encode,
    loss_curve,
    probe_by_layer,
    spread,
)

METRICS = [
    {"kind": "start", "step": 0, "uniform_loss": 2.833, "unigram_loss": 2.08},
    {"kind": "train", "step": 50, "loss": 2.5},
    {"kind": "train", "step": 100, "loss": 1.7},
    {"kind": "validation", "step": 100, "loss": 1.6, "best": True},
    {"kind": "train", "step": 150, "loss": 1.5},
    {"kind": "validation", "step": 150, "loss": 1.65, "best": False},
]
PROBE = {
    "images": {"train": 100, "validation": 20, "test": 25},
    "layers": [
        {"layer": 0, "validation_accuracy": 0.5, "test_accuracy": 0.55},
        {"layer": 1, "validation_accuracy": 0.8, "test_accuracy": 0.75},
        {"layer": 2, "validation_accuracy": 0.7, "test_accuracy": 0.78},
    ],
    "best_layer": 1,
    "baselines": {
        "raw_pixels": {"test_accuracy": 0.6},
        "untrained": {
            "layers": [{"layer": layer, "test_accuracy": 0.5 - layer / 10} for layer in range(3)],
            "best_layer": 0,
        },
    },
}


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.get_lines()}


def texts(figure):
    (axes,) = figure.axes
    return " | ".join(text.get_text() for text in axes.texts)


def picture(value, side=4):
    return np.full((side, side, 3), value, dtype=np.uint8)


class TestImageGrid:
    def test_every_pixel_becomes_a_square(self):
        pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
        grid = np.asarray(image_grid([list(row) for row in pictures], scale=5, gap=3))
        assert grid.shape == (2 * 23 + 3, 3 * 23 + 3, 3)
        for row in range(2):
            for column in range(3):
                top, left = 3 + 23 * row, 3 + 23 * column
                cell = grid[top : top + 20, left : left + 20].reshape(4, 5, 4, 5, 3)
                assert (cell == pictures[row, column][:, None, :, None]).all()
        assert (grid[:3] == 128).all()
        assert (grid[:, 23:26] == 128).all()

    @pytest.mark.parametrize(("side", "shown"), [(8, 64), (32, 64), (48, 96), (64, 64), (96, 96)])
    def test_pictures_are_enlarged_to_at_least_64(self, side, shown):
        assert image_grid([[picture(0, side)]], gap=0).size == (shown, shown)

    def test_rows_may_be_incomplete(self):
        grid = np.asarray(image_grid([[picture(1), picture(2)], [picture(3)]], scale=1, gap=0))
        assert (grid[4:, 4:] == 128).all()
        assert (grid[4:, :4] == 3).all()

    @pytest.mark.parametrize("side", [8, 32, 48])
    def test_its_images_can_be_counted(self, side):
        grid = image_grid([[picture(0, side)] * 7, [picture(128, side), picture(1, side)]])
        assert grid_counts(grid, side) == [7, 2]
        assert grid_counts(grid.crop((0, 0, grid.width - 1, grid.height)), side) is None

    def test_headings_are_in_a_line_above_the_images(self):
        rows = [[picture(0, 8)] * 6] * 2
        plain, headed = image_grid(rows), image_grid(rows, headings={0: "original", 2: "others"})
        line = np.asarray(headed)[: headed.height - plain.height]
        np.testing.assert_array_equal(np.asarray(headed)[len(line) :], np.asarray(plain))
        written = np.flatnonzero((line != 128).any(axis=(0, 2)))
        assert set(written // 66) == {0, 2}  # each heading fits above the column where it begins
        assert grid_counts(headed, 8) == grid_counts(plain, 8) == [6, 6]

    @pytest.mark.parametrize(
        "rows",
        [
            [],
            [[]],
            [[picture(0), picture(0, 5)]],
            [[picture(0).astype(float)]],
            [[np.zeros((4, 4), np.uint8)]],
        ],
    )
    def test_invalid_grids_are_refused(self, rows):
        with pytest.raises(InputError):
            image_grid(rows)


class TestLossCurve:
    def test_lines_are_the_records(self):
        drawn = lines(loss_curve(METRICS))
        assert drawn["training"].get_xydata().tolist() == [[50, 2.5], [100, 1.7], [150, 1.5]]
        assert drawn["validation"].get_xydata().tolist() == [[100, 1.6], [150, 1.65]]
        assert set(drawn["uniform"].get_ydata()) == {2.833}
        assert set(drawn["unigram"].get_ydata()) == {2.08}

    def test_a_single_training_loss_is_a_point(self):
        (first, *_) = (record for record in METRICS if record["kind"] == "train")
        others = [record for record in METRICS if record["kind"] != "train"]
        assert lines(loss_curve([first, *others]))["training"].get_marker() == "o"
        assert lines(loss_curve(METRICS))["training"].get_marker() == "None"

    def test_the_lowest_validation_loss_is_marked_and_labelled(self):
        figure = loss_curve(METRICS)
        assert lines(figure)["best"].get_xydata().tolist() == [[100, 1.6]]
        assert "best 1.600, step 100" in texts(figure)

    def test_lines_and_baselines_are_labelled_at_their_ends(self):
        words = texts(loss_curve(METRICS, unit="nats/masked pixel"))
        for expected in ("training", "validation", "uniform 2.83", "colour\nfrequencies 2.08"):
            assert expected in words
        assert (
            loss_curve(METRICS, unit="nats/masked pixel").axes[0].get_ylabel()
            == "loss, nats/masked pixel"
        )

    def test_everything_is_within_the_axes(self):
        axes = loss_curve(METRICS).axes[0]
        low, high = axes.get_ylim()
        assert low < 1.5
        assert high > 2.833

    def test_steps_discarded_by_a_kill_are_not_drawn(self):
        again = [
            *METRICS,
            {"kind": "resume", "step": 100},
            {"kind": "train", "step": 150, "loss": 1.4},
        ]
        drawn = lines(loss_curve(again))
        assert drawn["training"].get_xydata().tolist() == [[50, 2.5], [100, 1.7], [150, 1.4]]
        assert drawn["validation"].get_xydata().tolist() == [[100, 1.6]]

    @pytest.mark.parametrize(
        "metrics",
        [
            [],
            METRICS[:1],
            METRICS[:2],
            [{"kind": "train", "step": 1, "loss": math.nan}],
            [*METRICS, {"kind": "validation", "step": 200, "loss": math.inf, "best": False}],
        ],
    )
    def test_incomplete_and_diverged_runs_can_be_drawn(self, metrics):
        assert encode(loss_curve(metrics)).startswith("data:image/svg+xml;base64,")


def test_accuracy_is_drawn_in_percent_and_its_best_is_marked():
    errors = [(100, 0.5), (200, 0.2), (300, 0.3)]
    metrics = [
        {"kind": "validation", "step": step, "error": error, "best": False}
        for step, error in errors
    ]
    figure = accuracy_curve(metrics)
    assert lines(figure)["validation"].get_xydata() == pytest.approx(
        np.array([[100, 50], [200, 80], [300, 70]])
    )
    assert lines(figure)["best"].get_xydata() == pytest.approx(np.array([[200, 80]]))
    assert "best 80.0 %, step 200" in texts(figure)


class TestProbe:
    def test_lines_are_the_records_in_percent(self):
        drawn = lines(probe_by_layer(PROBE))
        assert drawn["test"].get_ydata() == pytest.approx([55, 75, 78])
        assert drawn["validation"].get_ydata() == pytest.approx([50, 80, 70])
        assert drawn["untrained"].get_ydata() == pytest.approx([50, 40, 30])
        assert set(drawn["raw pixels"].get_ydata()) == {60.0}

    def test_the_layer_selected_on_validation_is_marked(self):
        figure = probe_by_layer(PROBE)
        assert lines(figure)["best"].get_xydata().tolist() == [[1, 75]]
        assert "layer 1: 75.0 %" in texts(figure)

    def test_the_ring_of_the_first_layer_covers_no_number(self):
        first = {**PROBE["layers"][0], "validation_accuracy": 1.0, "test_accuracy": 1.0}
        figure = probe_by_layer({**PROBE, "layers": [first, *PROBE["layers"][1:]], "best_layer": 0})
        ring = lines(figure)["best"].get_window_extent()
        numbers = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert max(box.x1 for box in numbers) < ring.x0

    def test_the_band_is_one_standard_error(self):
        (band,) = probe_by_layer(PROBE).axes[0].collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(78 + 100 * math.sqrt(0.78 * 0.22 / 25))

    def test_baselines_are_optional(self):
        drawn = lines(probe_by_layer({**PROBE, "baselines": {}}))
        assert set(drawn) == {"test", "validation", "best"}

    def test_one_layer_and_perfect_predictions_can_be_drawn(self):
        only = {
            **PROBE,
            "layers": [{"layer": 1, "validation_accuracy": 1.0, "test_accuracy": 1.0}],
            "baselines": {},
        }
        assert set(lines(probe_by_layer(only))) == {"test", "validation", "best"}
        assert encode(probe_by_layer(only)).startswith("data:image/svg+xml")


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("classes", [3, 10, 20])
def test_long_names_of_classes_do_not_overlap(classes, width):
    names = [f"Saintpaulia ionantha number {index}" for index in range(classes)]
    figure = confusion_matrix(np.eye(classes, dtype=int).tolist(), names, width=width)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == str(classes)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(box.x0 > axes.yaxis.label.get_window_extent().x1 for box in boxes)
    assert all(above.y0 > below.y1 - 1 for above, below in pairwise(boxes))
    assert axes.get_yticklabels()[0].get_text().startswith("Saintpaulia")


class TestEncode:
    def svg(self, uri):
        return base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()

    def test_the_same_figure_gives_the_same_characters(self):
        assert encode(loss_curve(METRICS)) == encode(loss_curve(METRICS))

    def test_text_stays_text_and_nothing_is_loaded(self):
        text = self.svg(encode(loss_curve(METRICS)))
        assert "training step" in text
        links = [
            value
            for element in ElementTree.fromstring(text).iter()
            for name, value in element.attrib.items()
            if name.endswith("href") and not value.startswith(("#", "data:"))
        ]
        assert links == []

    def test_a_long_run_gives_a_small_file(self):
        steps = np.random.default_rng(0).normal(2, 0.1, 20_000)
        metrics = [
            {"kind": "train", "step": step, "loss": loss}
            for step, loss in enumerate(steps.tolist())
        ]
        assert len(encode(loss_curve(metrics))) < 300_000

    def test_themes_and_widths_differ(self):
        versions = {
            encode(probe_by_layer(PROBE, look=k, width=w))
            for k in (LIGHT, DARK)
            for w in (WIDE, NARROW)
        }
        assert len(versions) == 4

    def test_settings_of_matplotlib_are_not_changed(self):
        import matplotlib

        before = dict(matplotlib.rcParams)
        encode(loss_curve(METRICS))
        assert dict(matplotlib.rcParams) == before

    def test_pictures_become_png(self):
        assert encode(image_grid([[picture(7)]])).startswith("data:image/png;base64,")


@pytest.mark.parametrize("middles", [[0, 0, 0], [0, 1, 2, 3], [0, 100], [5]])
def test_spread_labels_do_not_overlap_and_keep_their_order(middles):
    placed = spread(middles, [10] * len(middles))
    assert all(after - before > 9.9 for before, after in pairwise(placed))
    assert sum(placed) == pytest.approx(sum(middles))
