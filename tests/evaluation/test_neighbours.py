"""Classification by nearest neighbours equals scikit-learn's, whatever the sizes of the blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation import neighbours
from igpt.evaluation.features import pooled
from igpt.evaluation.neighbours import classify_by_neighbours
from igpt.evaluation.results import read_probe
from igpt.model.transformer import ImageGPT
from igpt.statistics import unpacked


def rival(k: int) -> KNeighborsClassifier:
    """Return scikit-learn's classifier with the same weights; it gives distances 1 - cosine."""
    return KNeighborsClassifier(
        k, weights=lambda distances: np.exp((1 - distances) / 0.07), metric="cosine"
    )


@pytest.mark.parametrize("k", [1, 5, 20, 150])
@pytest.mark.parametrize("size", [7, 64, 4096])
def test_predictions_are_scikit_learns(k: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks smaller than k, and a last block with fewer rows."""
    monkeypatch.setattr(neighbours, "_ROWS", size)
    generator = np.random.default_rng(k)
    labels = generator.integers(0, 4, 150)
    centres = generator.normal(size=(4, 12))
    known = (centres[labels] + 1.5 * generator.normal(size=(150, 12))).astype(np.float32)
    asked = (centres[generator.integers(0, 4, 90)] + generator.normal(size=(90, 12))).astype("f4")
    found = classify_by_neighbours(known, labels, asked, k)
    np.testing.assert_array_equal(found, rival(k).fit(known, labels).predict(asked))
    assert len(set(found.tolist())) > 1


def test_near_neighbours_outvote_more_distant_ones() -> None:
    known = np.array([[1, 0], [1, 1], [1, 1.1]], np.float32)
    labels = np.array([1, 0, 0])
    assert classify_by_neighbours(known, labels, np.array([[2, 0.1]], np.float32), 3) == [1]
    plain = KNeighborsClassifier(3, metric="cosine").fit(known, labels)
    assert plain.predict([[2, 0.1]]) == [0], "two of three are of class 0"


@pytest.mark.parametrize("broken", ["known", "asked"])
def test_features_that_are_not_finite_are_refused(broken: str) -> None:
    arrays = {name: np.ones((30, 4), np.float32) for name in ("known", "asked")}
    arrays[broken][3, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        classify_by_neighbours(arrays["known"], np.zeros(30, np.int64), arrays["asked"], 5)


def test_a_probe_reports_every_layer(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    words = ("probe", short_run, digits.path, "--strengths", 0.1, "-o", tmp_path / "probe.json")
    done = igpt(*words, "--knn", 20, "--concatenate", 0, 1)
    assert done.returncode == 0, done.stderr
    result = read_probe(tmp_path / "probe.json")
    model = ImageGPT.from_pretrained(short_run / "model")
    features = {
        name: np.concatenate(list(pooled(model, digits[name])), axis=1).astype(np.float64)
        for name in digits
    }
    labels = {name: digits[name].labels for name in digits}
    both = np.concatenate([labels["train"], labels["validation"]])
    for row in result["layers"]:
        x = {name: array[row["layer"]] for name, array in features.items()}
        selected = rival(20).fit(x["train"], labels["train"])
        final = rival(20).fit(np.concatenate([x["train"], x["validation"]]), both)
        found = row["knn"]
        assert found["k"] == 20
        score = selected.score(x["validation"], labels["validation"])
        assert found["validation_accuracy"] == pytest.approx(score, abs=1e-9)
        answers = final.predict(x["test"]) == labels["test"]
        np.testing.assert_array_equal(unpacked(found["test_right"], 180), answers)
        assert found["test_accuracy"] == pytest.approx(answers.mean(), abs=1e-9)
        shown = f"; 20 nearest neighbours {score:.1%}, {answers.mean():.1%}"
        assert shown in done.stdout.splitlines()[row["layer"]]
    best = max(result["layers"], key=lambda row: row["knn"]["validation_accuracy"])
    assert done.stdout.splitlines()[-1].startswith(
        f"20 nearest neighbours: best layer {best['layer']}: test accuracy "
    )
    assert result["baselines"]["raw_pixels"]["knn"]["test_accuracy"] > 0.8
    assert result["concatenated"]["knn"]["test_accuracy"] > 0.2, "ten classes: chance is 0.1"
    assert all("knn" in row for row in result["baselines"]["untrained"]["layers"])


def test_without_the_flag_there_are_no_neighbours(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    words = ("--strengths", 0.1, "--limit", 100, "--no-baselines", "-o", tmp_path / "probe.json")
    done = igpt("probe", short_run, digits.path, *words)
    assert "neighbour" not in done.stdout
    assert all("knn" not in row for row in read_probe(tmp_path / "probe.json")["layers"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--knn", 0), "knn = 0"),
        (("--knn", 60, "--limit", 50), "at least 60 training images for 60 nearest neighbours"),
    ],
)
def test_wrong_numbers_of_neighbours_are_refused(
    igpt: Any,
    short_run: Path,
    digits: TokenDataset,
    tmp_path: Path,
    words: tuple[object, ...],
    said: str,
) -> None:
    done = igpt("probe", short_run, digits.path, *words, "-o", tmp_path / "p.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
