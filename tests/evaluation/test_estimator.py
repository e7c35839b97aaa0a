"""Features as a scikit-learn transformer: every kind of image, pipelines, pickles, and
scikit-learn's own checks."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

from igpt import ImageGPTFeatures
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.features import pooled
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT


@pytest.fixture(scope="module")
def pixels(digits: TokenDataset) -> NDArray[np.uint8]:
    """Return the test images of the digits: grey, uint8 [180, 8, 8]."""
    tokens = digits["test"].rows(np.arange(180))
    return digits.palette.inverse_transform(tokens)[..., 0].reshape(180, 8, 8)


@pytest.fixture(scope="module")
def expected(short_run: Path, digits: TokenDataset) -> NDArray[np.float32]:
    """Return their features of all layers: [3, 180, 32]."""
    return np.concatenate(
        list(pooled(ImageGPT.from_pretrained(short_run / "model"), digits["test"])), axis=1
    )


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run to write into."""
    shutil.copytree(short_run / "model", tmp_path / "run" / "model")
    return tmp_path / "run"


def test_features_are_those_of_the_layer(
    short_run: Path, pixels: NDArray[np.uint8], expected: NDArray[np.float32]
) -> None:
    for layer in range(3):
        made = ImageGPTFeatures(short_run, layer=layer)
        found = made.fit_transform(pixels)
        assert (found.dtype, found.shape) == (np.float32, (180, 32))
        np.testing.assert_array_equal(found, expected[layer])
        assert (made.layer_, made.n_features_out_, made.model_.config.n_layer) == (layer, 32, 2)
    small = ImageGPTFeatures(str(short_run / "model"), layer=1, batch_size=7).fit_transform(pixels)
    np.testing.assert_allclose(small, expected[1], atol=1e-5)
    half = ImageGPTFeatures(short_run, layer=1, precision="bf16").fit_transform(pixels)
    assert 0 < abs(half - expected[1]).max() < 0.1


def test_every_kind_of_image(
    short_run: Path, pixels: NDArray[np.uint8], expected: NDArray[np.float32], tmp_path: Path
) -> None:
    some = pixels[:5]
    files = [tmp_path / f"{index}.png" for index in range(5)]
    for file, image in zip(files, some, strict=True):
        Image.fromarray(image).save(file)
    made = ImageGPTFeatures(short_run, layer=1).fit(None)
    kinds: dict[str, Any] = {
        "coloured": some[..., None].repeat(3, -1),
        "arrays": list(some),
        "pictures": [Image.fromarray(image) for image in some],
        "paths": files,
        "names": np.array([str(file) for file in files]),
        "objects": np.array(files, dtype=object),
        "four times as large": some.repeat(4, 1).repeat(4, 2),
        "of several sizes": [
            some[0],
            some[1].repeat(2, 0).repeat(2, 1),
            files[2],
            *some[3:].repeat(3, 1).repeat(3, 2),
        ],
        "wide": [np.pad(image.repeat(2, 0).repeat(2, 1), ((0, 0), (8, 8))) for image in some],
    }
    for kind, images in kinds.items():
        np.testing.assert_allclose(made.transform(images), expected[1, :5], atol=1e-5, err_msg=kind)


def test_which_layer_is_selected(run: Path, digits: TokenDataset, tmp_path: Path) -> None:
    assert ImageGPTFeatures(run).fit(None).layer_ == 1, "the middle one of 0, 1, 2"
    probe = {
        "format": "igpt-probe",
        "version": 2,
        "classes": 10,
        "images": {"train": 9, "validation": 9, "test": 9},
    }
    probe |= {
        "layers": [{"layer": 2, "validation_accuracy": 0.5, "test_accuracy": 0.5}],
        "best_layer": 2,
    }
    (run / "probe.json").write_text(json.dumps(probe))
    assert ImageGPTFeatures(run).fit(None).layer_ == 2
    assert ImageGPTFeatures(run, layer=0).fit(None).layer_ == 0
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 6, "n_embd": 8, "n_head": 1}
    ImageGPT(ModelConfig.layered(shape), digits.palette).save_pretrained(tmp_path / "deep")
    assert ImageGPTFeatures(tmp_path / "deep").fit(None).layer_ == 3


def test_in_a_pipeline_and_a_search(
    short_run: Path, pixels: NDArray[np.uint8], digits: TokenDataset
) -> None:
    labels = digits["test"].labels
    pipeline = make_pipeline(
        ImageGPTFeatures(short_run, layer=1), StandardScaler(), LogisticRegression(max_iter=500)
    )
    assert cross_val_score(pipeline, pixels, labels, cv=3).mean() > 0.4, (
        "ten classes: chance is 0.1"
    )
    search = GridSearchCV(
        pipeline,
        {"imagegptfeatures__layer": [0, 2], "logisticregression__C": [0.1]},
        cv=2,
        n_jobs=1,
    )
    search.fit(list(pixels), labels)
    assert search.best_params_["imagegptfeatures__layer"] in (0, 2)
    assert search.predict(list(pixels[:3])).shape == (3,)
    assert search.best_estimator_[0].layer_ == search.best_params_["imagegptfeatures__layer"]
    copy = clone(search.best_estimator_)
    assert copy[0].get_params() == search.best_estimator_[0].get_params()
    with pytest.raises(NotFittedError):
        copy[0].transform(pixels)


def test_feature_names_and_data_frames(short_run: Path, pixels: NDArray[np.uint8]) -> None:
    made = ImageGPTFeatures(short_run, layer=1)
    with pytest.raises(NotFittedError):
        made.get_feature_names_out()
    names = made.fit(None).get_feature_names_out()
    assert names.tolist() == [f"imagegptfeatures{index}" for index in range(32)]
    frame = made.set_output(transform="pandas").transform(pixels[:4])
    assert frame.shape == (4, 32)
    assert frame.columns.tolist() == names.tolist()


@pytest.mark.parametrize("store", [pickle, joblib])
def test_a_pickled_transformer_gives_the_same(
    short_run: Path,
    pixels: NDArray[np.uint8],
    expected: NDArray[np.float32],
    tmp_path: Path,
    store: Any,
) -> None:
    made = ImageGPTFeatures(short_run, layer=2).fit(None)
    with (tmp_path / "made").open("wb") as file:
        store.dump(made, file)
    with (tmp_path / "made").open("rb") as file:
        np.testing.assert_array_equal(store.load(file).transform(pixels), expected[2])
    np.testing.assert_array_equal(made.transform(pixels), expected[2])


def test_mistakes_are_named(run: Path, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    def refusal(act: Callable[[], object]) -> str:
        with pytest.raises(InputError) as caught:
            act()
        return str(caught.value)

    made = ImageGPTFeatures(run, layer=1).fit(None)
    assert "the layers 0 to 2, not 3" in refusal(lambda: ImageGPTFeatures(run, layer=3).fit(None))
    assert "not 0 and 'fp32'" in refusal(lambda: ImageGPTFeatures(run, batch_size=0).fit(None))
    assert "not None and 'fp16'" in refusal(
        lambda: ImageGPTFeatures(run, precision="fp16").fit(None)
    )
    assert "no model directory" in refusal(lambda: ImageGPTFeatures(tmp_path / "none").fit(None))
    assert "uint8 [N, H, W, 3] or [N, H, W], not float64 [5, 8, 8]" in refusal(
        lambda: made.transform(pixels[:5] / 255)
    )
    assert "not uint8 [180, 64]" in refusal(lambda: made.transform(pixels.reshape(180, 64)))
    assert "looks like one coloured image" in refusal(
        lambda: made.transform(np.zeros((8, 8, 3), np.uint8))
    )
    assert "a list or an array of images is needed, not str" in refusal(
        lambda: made.transform("image.png")
    )
    assert "not NoneType" in refusal(lambda: made.transform(None))
    assert "image 1: no such file" in refusal(
        lambda: made.transform([pixels[0], tmp_path / "none.png"])
    )
    assert "image 0: floating-point pixels have no known range" in refusal(
        lambda: made.transform([pixels[0] / 255])
    )
    assert "there are no images here" in refusal(lambda: made.transform([]))
    bare = ImageGPT(
        ModelConfig.layered(
            {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 8, "n_head": 1}
        )
    )
    bare.save_pretrained(tmp_path / "bare")
    assert "holds no palette" in refusal(lambda: ImageGPTFeatures(tmp_path / "bare").fit(None))


class OfRows(ImageGPTFeatures):
    """Accept rows of numbers as images one pixel wide: scikit-learn has no checks with images."""

    def fit(self, X: Any, y: Any = None) -> "OfRows":  # noqa: N803
        validate_data(self, X)
        return super().fit(X, y)

    def transform(self, X: Any) -> NDArray[np.float32]:  # noqa: N803
        check_is_fitted(self)
        numbers = np.asarray(validate_data(self, X, reset=False), dtype=np.float64)
        return super().transform((128 + 32 * numbers).clip(0, 255).astype(np.uint8)[:, :, None])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def test_scikit_learns_own_checks(short_run: Path) -> None:
    """All checks that scikit-learn has for transformers: cloning, parameters, pickles, order of
    samples, idempotence ..."""
    done = check_estimator(OfRows(short_run / "model", batch_size=32), on_skip=None)
    passed = {check["check_name"] for check in done if check["status"] == "passed"}
    assert {check["check_name"] for check in done} - passed <= {"check_array_api_input"}, (
        "which needs SCIPY_ARRAY_API"
    )
    assert passed >= {
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_estimators_pickle",
        "check_fit_idempotent",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_readonly_memmap_input",
        "check_transformer_general",
        "check_transformers_unfitted",
    }


def test_the_tags_declare_images(short_run: Path) -> None:
    tags = ImageGPTFeatures(short_run).__sklearn_tags__().input_tags
    assert (tags.two_d_array, tags.three_d_array) == (False, True)


def test_it_is_imported_on_demand() -> None:
    code = (
        "import sys, igpt; assert 'sklearn' not in sys.modules; igpt.ImageGPTFeatures; "
        "assert 'sklearn' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
