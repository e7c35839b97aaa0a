"""Answers for synthetic results whose answer is known, and inconclusive ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from igpt.errors import InputError
from igpt.evaluation.results import PROBE, PROBE_VERSION, TEST, TEST_VERSION
from igpt.reproduction.evidence import (
    NotDone,
    Results,
    accuracy_of_subsets,
    accuracy_on,
    clearly,
    difference,
)
from igpt.reproduction.questions import QUESTIONS
from igpt.reproduction.runner import FORMAT, RECORD, VERSION, read_records
from igpt.reproduction.scale import Scale, scale
from igpt.statistics import interval_of_share, packed

from ..helpers import malformed

SCALE = scale("cpu", rehearsal=True)
SIZES = list(SCALE.sizes)


def row(accuracy: float, images: int, name: str) -> dict[str, Any]:
    """Return a row of results, correct on images sampled by its name: rows are independent."""
    right = np.random.default_rng(crc32(name.encode())).permutation(images) < round(
        accuracy * images
    )
    return {"test_accuracy": float(right.mean()), "test_right": packed(right)}


class Made:
    """A folder of results; every written step is recorded as done."""

    def __init__(self, folder: Path, scale: Scale = SCALE) -> None:
        self.folder, self.scale, self.steps = folder, scale, dict[str, Any]()

    def _record(self, name: str, path: str, value: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(value)
        machine = {
            "igpt": "0.1.0",
            "torch": "2.13.0",
            "processor": "a processor",
            "cores": 2,
            "gpu": None,
        }
        about = {"command": ["a"], "ended": "done", "seconds": 1.0, "side_by_side": 1}
        self.steps[name] = {**about, "machine": machine}
        record = {"format": FORMAT, "version": VERSION, "steps": self.steps}
        (self.folder / RECORD).write_text(json.dumps(record))

    def probe(
        self,
        name: str,
        accuracies: list[float],
        best: int,
        images: int = 2000,
        right: str = "",
        **more: Any,
    ) -> None:
        layers = [
            {
                "layer": layer,
                "validation_accuracy": value,
                **row(value, images, f"{right or name}, {layer}"),
            }
            for layer, value in enumerate(accuracies)
        ]
        counts = dict.fromkeys(("train", "validation", "test"), images)
        config = {"limit": images, "test_images": None, "seed": 0}
        about = {
            "best_layer": best,
            "images": counts,
            "classes": 10,
            "tokens": "tokens",
            "config": config,
        }
        whole = {"format": PROBE, "version": PROBE_VERSION, "layers": layers, **about, **more}
        self._record(f"probes/{name}", f"probes/{name}.json", json.dumps(whole))

    def run(self, name: str, losses: dict[int, float]) -> None:
        lines = [
            json.dumps({"kind": "validation", "step": step, "loss": loss})
            for step, loss in losses.items()
        ]
        self._record(f"runs/{name}", f"runs/{name}/metrics.jsonl", "\n".join(lines))

    def finetuned(self, name: str, accuracy: float, images: int = 2000, right: str = "") -> None:
        about = {"format": TEST, "version": TEST_VERSION, "test_images": images, "tokens": "tokens"}
        value = json.dumps({**about, **row(accuracy, images, right or name)})
        self._record(f"finetuned/{name}", f"finetuned/{name}/test.json", value)

    def answer(self, name: str) -> dict[str, Any]:
        answer = {asked.name: asked.answer for asked in QUESTIONS}[name]
        return vars(answer(self.results))

    @property
    def results(self) -> Results:
        return Results(self.folder, self.scale, read_records(self.folder))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_intervals() -> None:
    share = accuracy_on(0.5, 400)
    assert (share.low, share.high) == interval_of_share(200, 400)
    found, half = difference(accuracy_on(0.6, 400), share)
    assert found == pytest.approx(10)
    assert half == pytest.approx(196 * (0.025**2 + 0.6 * 0.4 / 400) ** 0.5, rel=1e-2)
    assert clearly(accuracy_on(0.6, 400), share)
    assert not clearly(accuracy_on(0.55, 400), share)
    subsets = accuracy_of_subsets([0.1, 0.2, 0.3], 50)  # Student's t of 2 degrees of freedom: 4.303
    assert subsets.value == pytest.approx(0.2)
    assert subsets.low == 0
    assert subsets.half_width == subsets.high - subsets.value, "although the lower end is cut at 0"
    of_labels, of_test = 4.303 * 0.1 / 3**0.5, accuracy_on(0.2, 50).half_width
    assert subsets.high - subsets.value == pytest.approx(
        (of_labels**2 + of_test**2) ** 0.5, rel=1e-3
    )
    assert subsets.n == "3 label subsets, 50 images"
    same = accuracy_of_subsets([0.1, 0.1], 1000)
    assert same.half_width == pytest.approx(accuracy_on(0.1, 1000).half_width), (
        "the images' part stays even if all subsets agree"
    )


def test_label_subsets_are_compared_pairwise(made: Made) -> None:
    """With the same subsets and images, only predictions that differ add to the interval."""
    wins = [
        [40, 60],
        [50, 70],
        [60, 80],
        # correct predictions of 100, by subset; the lower row's are also correct in the higher row
    ]
    for subset, pair in enumerate(wins):
        for start, count in zip(("scratch", "ar"), pair, strict=True):
            made.finetuned(f"{start}-4-{subset}", count / 100, images=100, right=f"{subset}")
    results = replace(made.results, scale=replace(SCALE, subsets=3))
    first, second = results.finetuned("ar", 4), results.finetuned("scratch", 4)
    found, half = difference(first, second)
    assert found == pytest.approx(20)
    each = np.mean(
        np.asarray(first.right, float) - second.right, axis=0
    )  # 20 points in every subset: these add nothing
    assert half == pytest.approx(196 * each.std(ddof=1) / 10, rel=1e-3)
    assert half < np.hypot(100 * first.half_width, 100 * second.half_width) / 3
    assert difference(first, replace(second, images=())) == pytest.approx(
        (20, 100 * np.hypot(first.half_width, second.half_width))
    )
    spread = replace(second, right=np.roll(second.right, 1, axis=0))
    assert difference(first, spread)[1] > 10, "subsets that differ add to it"


def test_a_result_of_an_earlier_version_is_refused(made: Made) -> None:
    made.finetuned("ar-all", 0.5)
    path = made.folder / "finetuned/ar-all/test.json"
    path.write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key != "test_right"
            }
        )
    )
    with pytest.raises(
        InputError, match="a result of a fine-tuning was written by an earlier igpt"
    ):
        made.results.finetuned("ar", "all")


@pytest.mark.parametrize(
    ("accuracies", "best", "held"),
    [
        ([0.3, 0.4, 0.5, 0.4], 2, "yes"),
        ([0.3, 0.4, 0.5, 0.49], 2, "undecided"),  # the last layer is not clearly worse
        ([0.3, 0.4, 0.49, 0.5], 3, "undecided"),  # nor clearly better
        ([0.3, 0.4, 0.45, 0.5], 3, "no"),
        ([0.3, 0.45, 0.5, 0.4], 1, "yes"),  # one peak, next to the layer that validation selected
        ([0.5, 0.4, 0.3, 0.3], 0, "no"),  # the first layer is clearly best
        ([0.3, 0.5, 0.3, 0.5, 0.4], 3, "no"),  # two peaks
        (
            [0.48, 0.46, 0.44, 0.42, 0.53, 0.4],
            4,
            "no",
        ),  # no single step of the decrease is significant, all together are
    ],
)
def test_layers(made: Made, accuracies: list[float], best: int, held: str) -> None:
    for name in ("main", *(f"{size}-{SCALE.steps}" for size in SIZES)):
        made.probe(name, accuracies, best)
    answer = made.answer("layers")
    assert answer["held"] == held
    assert f"best layer {best} of {len(accuracies) - 1}" in answer["verdict"]
    assert answer["plot"]["series"][0]["ring"] == best
    assert len(answer["table"]["rows"]) == len(SIZES) * len(accuracies)


def along_training(made: Made, lead: float, gain: float) -> dict[str, Any]:
    """Return the answer for sizes with overlapping losses, each `lead` better at equal loss."""
    for place, size in enumerate(SIZES):
        losses = {
            step: 3.0 - 0.5 * number - 0.2 * place for number, step in enumerate(SCALE.snapshots)
        }
        made.run(size, losses)
        for step, loss in losses.items():
            made.probe(f"{size}-{step}", [0.2, 0.3 + gain * (3.0 - loss) + lead * place], 1)
    return made.answer("loss")


def test_lower_loss_and_larger_models(made: Made) -> None:
    answer = along_training(made, lead=0.1, gain=0.1)
    assert answer["held"] == "yes"
    assert "clearly better in 2 of 2 pairs of sizes and clearly worse in 0" in answer["verdict"]
    assert f"{SIZES[1]} minus {SIZES[0]} at equal loss: +10.0 ±" in answer["verdict"]
    assert answer["plot"]["falling"]


@pytest.mark.parametrize(
    ("lead", "gain", "held", "words"),
    [
        (0.0, 0.1, "in part", "clearly better in 0 of 2 pairs of sizes and clearly worse in 0"),
        (-0.1, 0.1, "in part", "clearly better in 0 of 2 pairs of sizes and clearly worse in 2"),
        (0.0, 0.01, "undecided", "in 0 of 3 sizes and clearly does not in 0"),
        (0.0, -0.1, "no", "in 0 of 3 sizes and clearly does not in 3"),
    ],
)
def test_results_that_contradict_loss_and_size(
    made: Made, lead: float, gain: float, held: str, words: str
) -> None:
    answer = along_training(made, lead, gain)
    assert answer["held"] == held
    assert words in answer["verdict"]


def test_losses_that_do_not_overlap_are_inconclusive(made: Made) -> None:
    along_training(made, lead=0.1, gain=0.1)
    made.run(SIZES[-1], dict.fromkeys(SCALE.snapshots, 0.5))
    answer = made.answer("loss")
    assert answer["held"] == "in part"
    assert f"{SIZES[-1]} and {SIZES[-2]}: their losses do not overlap" in answer["verdict"]


@pytest.mark.parametrize(
    ("ar", "bert", "ar_tuned", "bert_tuned", "held"),
    [
        (0.5, 0.4, 0.6, 0.6, "yes"),
        (0.5, 0.4, 0.7, 0.55, "in part"),  # BERT is worse
        (0.5, 0.46, 0.6, 0.575, "in part"),  # the difference is smaller, but not significantly
        (0.5, 0.49, 0.6, 0.6, "undecided"),
        (0.4, 0.5, 0.6, 0.6, "no"),
    ],
)
def test_bert(
    made: Made, ar: float, bert: float, ar_tuned: float, bert_tuned: float, held: str
) -> None:
    made.probe("main", [0.1, ar], 1)
    made.probe("bert", [0.1, bert], 1)
    made.finetuned("ar-all", ar_tuned)
    made.finetuned("bert-all", bert_tuned)
    assert made.answer("bert")["held"] == held


def by_labels(made: Made, tuned: float, scratch: float, raw: float = 0.2) -> dict[str, Any]:
    few, few_of_pixels = (
        [
            {
                "per_class": labels,
                "test_accuracies": [share, share + 0.001],
                "mean": share,
                "standard_deviation": 0.001,
            }
            for labels in SCALE.few
        ]
        for share in (0.3, raw)
    )
    pixels = {**row(raw, 2000, "raw"), "validation_accuracy": raw, "few_labels": few_of_pixels}
    made.probe("main", [0.1, 0.4], 1, few_labels=few, baselines={"raw_pixels": pixels})
    for start, value in (("ar", tuned), ("scratch", scratch)):
        made.finetuned(f"{start}-all", value)
        for labels in SCALE.few:
            for subset in range(SCALE.subsets):
                made.finetuned(f"{start}-{labels}-{subset}", value + 0.001 * subset)
    return made.answer("finetuning")


def test_finetuning_is_better_throughout(made: Made) -> None:
    answer = by_labels(made, tuned=0.6, scratch=0.35)
    assert answer["held"] == "yes"
    assert answer["plot"]["categories"] == [*(f"{few} per class" for few in SCALE.few), "all"]
    assert len(answer["table"]["rows"]) == 4 * (len(SCALE.few) + 1)


def test_finetuning_is_better_and_worse(made: Made) -> None:
    assert by_labels(made, tuned=0.28, scratch=0.6)["held"] == "in part"


def test_finetuning_is_worse(made: Made) -> None:
    assert by_labels(made, tuned=0.1, scratch=0.35)["held"] == "no"


@pytest.mark.parametrize(
    ("low", "high", "held"), [(0.3, 0.4, "yes"), (0.4, 0.3, "no"), (0.3, 0.31, "undecided")]
)
def test_resolution(made: Made, low: float, high: float, held: str) -> None:
    sides = sorted(SCALE.resolutions)
    for side in sides:
        made.probe(f"at-{side}", [0.1, {sides[0]: low, sides[-1]: high}.get(side, low)], 1)
    assert made.answer("resolution")["held"] == held


def test_resolutions_are_compared_image_by_image(made: Made) -> None:
    sides = sorted(SCALE.resolutions)
    for (
        side
        # the higher resolution is correct on all images of the lower one, and on twenty more
    ) in sides:
        values = [0.1, 0.31 if side == sides[-1] else 0.3]
        made.probe(f"at-{side}", values, 1, right="all", tokens=f"tokens/labelled-{side}")
    assert made.answer("resolution")["held"] == "yes"


@pytest.fixture
def night(tmp_path: Path) -> Made:
    return Made(tmp_path, scale("night", rehearsal=True))


@pytest.mark.parametrize(
    ("at_equal_images", "at_equal_compute", "held"),
    [(0.4, 0.4, "yes"), (0.4, 0.3, "in part"), (0.3, 0.2, "no"), (0.3, 0.3, "undecided")],
)
def test_resolution_at_equal_compute(
    night: Made, at_equal_images: float, at_equal_compute: float, held: str
) -> None:
    sides = sorted(night.scale.resolutions)
    for side in sides:
        is_highest = side == sides[-1]
        night.probe(f"at-{side}", [0.1, at_equal_images if is_highest else 0.3], 1)
        night.probe(f"as-{side}", [0.1, at_equal_compute if is_highest else 0.3], 1)
    answer = night.answer("resolution")
    assert answer["held"] == held
    images = {row[0]: row[1] for row in answer["table"]["rows"][len(sides) :]}
    assert int(images[f"{sides[0]} px"]) > int(images[f"{sides[-1]} px"])


@pytest.mark.parametrize(("last", "held"), [(0.6, "yes"), (0.5, "undecided"), (0.4, "no")])
def test_the_last_doubling_of_compute(night: Made, last: float, held: str) -> None:
    doublings = night.scale.doublings
    night.run("long", {step: 3.0 - step / 10 for step in doublings})
    for step in doublings:
        night.probe(f"long-{step}", [0.1, last if step == doublings[-1] else 0.5], 1)
    answer = night.answer("compute")
    assert answer["held"] == held
    assert [row[:3] for row in answer["table"]["rows"]] == [
        [str(8 * step), f"{3.0 - step / 10:.3f}", "1 of 1"] for step in doublings
    ]


@pytest.mark.parametrize(
    ("probed", "scratch", "held"),
    [(0.5, 0.4, "yes"), (0.5, 0.6, "in part"), (0.2, 0.6, "no"), (0.3, 0.3, "undecided")],
)
def test_features_without_labels(night: Made, probed: float, scratch: float, held: str) -> None:
    raw = {**row(0.3, 2000, "raw"), "validation_accuracy": 0.3}
    untrained = {"best_layer": 1, "layers": [{**raw, **row(0.3, 2000, "un"), "layer": 1}]}
    night.probe("main", [0.1, probed], 1, baselines={"raw_pixels": raw, "untrained": untrained})
    for name in ("corpus-1", "modern-corpus-0", "modern-corpus-1", "long"):
        night.probe(name, [0.1, 0.9], 1)
    for name in ("scratch-all", "modern-scratch-all"):
        night.finetuned(name, scratch)
    answer = night.answer("without-labels")
    assert answer["held"] == held, "the paper's recipe decides"
    assert [len(line["x"]) for line in answer["plot"]["series"]] == [7, 2]
    assert len(answer["plot"]["categories"]) == len(answer["table"]["rows"]) == 9


def test_layers_of_both_images_and_seeds(night: Made) -> None:
    peaked, level = [0.3, 0.4, 0.5, 0.4], [0.3, 0.4, 0.5, 0.49]
    for name in ("main", "corpus-1", "labelled-0", "labelled-1"):
        night.probe(name, level if name == "main" else peaked, 2)
        night.probe(f"modern-{'corpus-0' if name == 'main' else name}", level, 2)
    answer = night.answer("layers")
    assert answer["held"] == "in part"
    assert answer["verdict"].startswith("3 of 4 models have a single peak at an inner layer")
    assert [line["name"] for line in answer["plot"]["series"]] == [
        f"{images}, seed {seed}" for images in ("corpus", "labelled") for seed in (0, 1)
    ]
    assert night.answer("layers-second")["held"] == "undecided"


def test_bert_is_compared_at_its_own_size(night: Made) -> None:
    for name, accuracy in (("ar-medium", 0.5), ("bert", 0.4), ("main", 0.1)):
        night.probe(name, [0.1, accuracy], 1)
    for name in ("ar-medium-all", "bert-all"):
        night.finetuned(name, 0.6)
    answer = night.answer("bert")
    assert answer["held"] == "yes"
    assert "6.67 times as many images for BERT, so as many predicted positions" in answer["how"]


def test_missing_steps_are_named(made: Made) -> None:
    made.probe(f"{SIZES[0]}-{SCALE.steps}", [0.1, 0.2], 1)
    with pytest.raises(NotDone, match="probes/main"):
        made.answer("layers")


def asked(made: Made, names: tuple[str, ...]) -> None:
    for name in names:
        made.answer(name)


def test_malformed_results_are_refused_in_one_line_or_make_no_difference(made: Made) -> None:
    small = replace(SCALE, sizes={size: SCALE.sizes[size] for size in SIZES[:2]}, few=SCALE.few[:1])
    made = Made(made.folder, replace(small, main=SIZES[0], snapshots=SCALE.snapshots[-2:]))
    few = {
        "per_class": made.scale.few[0],
        "test_accuracies": [0.3, 0.4],
        "mean": 0.35,
        "standard_deviation": 0.01,
    }
    pixels = {**row(0.2, 8, "raw"), "validation_accuracy": 0.2, "few_labels": [few]}
    more = {"few_labels": [few], "baselines": {"raw_pixels": pixels}}
    for name in (
        "main",
        f"{SIZES[1]}-{made.scale.steps}",
        *(f"{size}-{step}" for size in SIZES for step in (2, 4)),
    ):
        made.probe(name, [0.25, 0.5], 1, images=8, **more)
    for size in made.scale.sizes:
        made.run(size, dict.fromkeys(made.scale.snapshots, 2.0))
    for start in ("ar", "scratch"):
        for labels in (
            "all",
            *(f"{made.scale.few[0]}-{subset}" for subset in range(made.scale.subsets)),
        ):
            made.finetuned(f"{start}-{labels}", 0.5, images=8)
    questions = {
        "steps.json": ("finetuning",),
        "probes/main.json": ("layers", "finetuning"),
        "finetuned/ar-all/test.json": ("finetuning",),
    }
    for name, names in questions.items():
        asked(made, names)
        refused = 0
        for what in malformed.files(made.folder / name):
            try:
                asked(made, names)
            except InputError as error:
                said, refused = str(error), refused + 1
                assert Path(name).name in said or "written by an earlier igpt" in said, (what, said)
                assert "\n" not in said, what
            except NotDone:
                assert name == "steps.json", what
        assert refused > 80, name
        asked(made, names)


def test_malformed_lines_of_metrics_are_refused_in_one_line(made: Made) -> None:
    along_training(made, lead=0.1, gain=0.1)
    path = made.folder / "runs" / SIZES[0] / "metrics.jsonl"
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    for what, last in malformed.variants(lines[-1]):
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], last]))
        try:
            asked(made, ("loss",))
        except InputError as error:
            said = str(error)
            assert (
                f"metrics.jsonl: the validation loss of step {SCALE.snapshots[-1]} is missing"
                in said
            ), what
    path.write_bytes(whole)
    for what in malformed.others(path):
        with pytest.raises(InputError, match=r"metrics\.jsonl") as refusal:
            asked(made, ("loss",))
        assert "\n" not in str(refusal.value), what


def test_few_labels_of_other_numbers_are_refused(made: Made) -> None:
    made.probe("main", [0.1, 0.4], 1)
    with pytest.raises(
        InputError, match=r"main\.json: few_labels are not for \(1, 2\) labels per class"
    ):
        made.answer("finetuning")


def test_label_subsets_on_other_images_are_refused(made: Made) -> None:
    for subset, images in enumerate((100, 104)):
        made.finetuned(f"ar-4-{subset}", 0.5, images=images)
    with pytest.raises(
        InputError, match=r"ar-4-1/test\.json has other test images than .*ar-4-0/test\.json"
    ):
        made.results.finetuned("ar", 4)
