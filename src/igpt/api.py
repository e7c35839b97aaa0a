"""The commands as functions: `igpt.prepare`, `igpt.pretrain` and so on.

The command line calls the same functions. Settings are keywords with the names of the fields of the
configuration classes, which are those of the flags. A model is a run directory, a model directory,
the name of a built-in model ("photos-16") or a Hub id; a token data set is its folder. Images are
PIL images, arrays uint8 [H, W, 3] or [H, W], or paths of files.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from igpt.config import file_settings
from igpt.errors import InputError
from igpt.model.locate import model_and_run
from igpt.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from igpt.data.ray_pool import RayCluster
    from igpt.data.tokens.dataset import TokenDataset
    from igpt.model.precision import Precision
    from igpt.model.transformer import ImageGPT
    from igpt.sampling.jobs import SamplingSettings

PathName = str | os.PathLike[str]


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A run directory, which all functions accept as a model.

    Attributes:
        path: the directory.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @cached_property
    def model(self) -> "ImageGPT":
        """The best model by validation, on the CPU."""
        from igpt.model.transformer import ImageGPT

        return ImageGPT.from_pretrained(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `kind`, `step`, and losses, rates and times."""
        from igpt.training.metrics import read_metrics

        return read_metrics(self.path / "metrics.jsonl")

    @property
    def test(self) -> Mapping[str, Any]:
        """The content of test.json: test accuracy, its interval, and the selected learning rate.

        Raises:
            InputError: the run is not one of fine-tuning.
        """
        from igpt.evaluation.results import read_test

        return read_test(self.path / "test.json")


def prepare(
    source: PathName,
    out: PathName,
    *,
    config: PathName | None = None,
    workers: int | None = None,
    cluster: "RayCluster | None" = None,
    **settings: Any,
) -> "TokenDataset":
    """Convert images to a token data set: palette, tokens, splits.

    The same call continues interrupted work.

    Args:
        source: "digits", a folder, a file or a Hub id; see
            `igpt.data.sources.catalogue.open_source`.
        out: folder to create, or the URL of one (`s3://bucket/tokens`).
        config: settings in YAML or JSON; keywords override them.
        workers: number of processes; all cores by default.
        cluster: runs the jobs on the nodes of a Ray cluster instead.
        settings: fields of `PrepareConfig`, such as `size=32`.

    Raises:
        InputError: a setting, the source or `out` cannot be used.
    """
    from igpt.data.prepare import PrepareConfig
    from igpt.data.prepare import prepare as run

    chosen = PrepareConfig.layered(file_settings(config), settings, where="the settings")
    count = os.cpu_count() or 1 if workers is None else workers
    with progress_bar() as show:
        return run(
            os.fspath(source),
            Path(out),
            chosen,
            workers=count,
            cluster=cluster,
            progress=partial(show, "tokenising"),
            phase=show,
        )


def pretrain(
    tokens: PathName,
    run: PathName,
    *,
    model: str | None = None,
    config: PathName | None = None,
    resume: bool = False,
    minutes: float | None = None,
    **settings: Any,
) -> Run:
    """Train a model on tokens, by default without labels.

    Args:
        tokens: token data set.
        run: run directory to write, or to continue with `resume`.
        model: preset of model and training, such as "tiny" or "igpt-s".
        config: settings in YAML or JSON; they override the preset.
        resume: continue an interrupted run from its newest intact checkpoint, or a finished one
            with a larger `steps`.
        minutes: stop after this time with a checkpoint, see `igpt.training.pretrain.pretrain`.
        settings: fields of `PretrainConfig`, such as `steps=200`; they override both.
            `from_model` is a model to start from, instead of `model`.

    Raises:
        InputError: a setting, the tokens or the run directory cannot be used, or nothing names the
            shape of the model.
        Interrupted: on Ctrl-C or SIGTERM, or after `minutes`; a checkpoint was saved.
    """
    from igpt.training.presets import ADAPTING, preset
    from igpt.training.pretrain import PretrainConfig
    from igpt.training.pretrain import pretrain as train

    start = settings.get("from_model")
    if start and model:
        raise InputError("--from takes the shape from a model; leave --model out")
    if start:
        settings["from_model"] = model_and_run(start)[0]
    named = ADAPTING if start and not resume else preset(model) if model else {}
    asked = {**file_settings(config), **settings, "tokens": Path(tokens)}
    chosen = {**named, **asked}
    found = PretrainConfig.layered(chosen, where="the settings")
    if not (resume or model or config or start or "n_layer" in settings):
        raise InputError(
            "name a model: --model PRESET (tiny, digits, photos, igpt-s, ...), --config FILE, or "
            "--from MODEL to continue with a pretrained one"
        )
    # Recorded steps and patience are changed by the user alone, not by the preset.
    mine = PretrainConfig.ending | PretrainConfig.extendable
    kept = mine - asked.keys() if resume else ()
    given = {key: getattr(found, key) for key in chosen if key not in kept}
    train(found, Path(run), given=given, resume=resume, minutes=minutes)
    return Run(Path(run))


def finetune(
    model: PathName,
    tokens: PathName,
    run: PathName,
    *,
    config: PathName | None = None,
    resume: bool = False,
    **settings: Any,
) -> Run:
    """Fine-tune a model with a class head on labelled tokens, and test it.

    Args:
        model: run or model directory.
        tokens: token data set with labels.
        run: run directory to write, or to continue with `resume`; `Run.test` has the results.
        config: settings in YAML or JSON; keywords override them.
        resume: continue an interrupted run.
        settings: fields of `FinetuneConfig`, such as `flip=True`.

    Raises:
        InputError: a setting, the model, the tokens or the run directory cannot be used.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    from igpt.training.finetune import FinetuneConfig
    from igpt.training.finetune import finetune as train

    asked = dict(settings)
    if "learning_rates" in asked and ("learning_rate" in asked or not asked["learning_rates"]):
        raise InputError(
            "give either one --learning-rate or several --learning-rates to select from"
        )
    if "learning_rate" in asked:
        asked["learning_rates"] = ()
    chosen = {
        **file_settings(config),
        **asked,
        "model": model_and_run(model)[0],
        "tokens": Path(tokens),
    }
    found = FinetuneConfig.layered(chosen, where="the settings")
    given = {key: getattr(found, key) for key in chosen}
    train(found, Path(run), given=given, resume=resume)
    return Run(Path(run))


def probe(
    model: "ImageGPT | PathName",
    tokens: PathName,
    *,
    out: PathName | None = None,
    features: PathName | None = None,
    config: PathName | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a linear classifier to the features of every layer.

    Args:
        tokens: token data set with labels.
        out: JSON to write, with the classifier in a .safetensors file of the same name; by default
            probe.json in the run. Nothing is written for a model without a run.
        features: folder to keep features in; those that it already holds are reused.
        config: settings in YAML or JSON; keywords override them.
        settings: fields of `ProbeConfig`, such as `limit=1000`.

    Returns:
        the results that probe.json holds; `igpt.evaluation.results.best_row` selects the best
            layer.

    Raises:
        InputError: a setting cannot be used, model and tokens do not match, or labels are missing.
    """
    from igpt.data.tokens.dataset import TokenDataset
    from igpt.evaluation.probe import ProbeConfig, write_probe
    from igpt.evaluation.probe import probe as run
    from igpt.evaluation.probe_classifier import require_replaceable
    from igpt.evaluation.results import PROBE, require_same_source
    from igpt.files import read_json
    from igpt.locks import exclusive
    from igpt.model.match import require_match
    from igpt.outputs import passing_folder, require_writable

    chosen = ProbeConfig.layered(file_settings(config), settings, where="the settings")
    name: dict[str, Any] = {}
    if isinstance(model, str | os.PathLike):
        path, home = model_and_run(model)
        name = {"model": str(path)}
        if out is None and home != Path():
            out = home / "probe.json"
    with ExitStack() as stack:
        if out is not None:
            target = Path(out)
            if target.suffix != ".json":
                raise InputError(
                    f"results of a probe are written to a .json file, not to {target.name}"
                )
            require_writable(target, PROBE)
            require_writable(target.with_suffix(".safetensors"))
            require_replaceable(target.with_suffix(".safetensors"))
            stack.enter_context(exclusive(target))
        loaded, data = load_model(model), TokenDataset(tokens)
        require_match(loaded, data, _name_of(model))
        if out is not None and target.exists():
            known = read_json(target, "probe").get("source")
            require_same_source(target, known, data.manifest["source"])
        show = stack.enter_context(progress_bar())
        if features is not None:
            folder = Path(features)
        elif out is not None:
            folder = stack.enter_context(passing_folder(target))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "features"
        result, classifier = run(loaded, data, chosen, folder, progress=show)
        if out is not None:
            write_probe(target, {**name, **result}, classifier)
    return {**name, **result}


def score(
    model: "ImageGPT | PathName",
    images: "PathName | Iterable[Any]",
    *,
    precision: "Precision" = "fp32",
    **settings: Any,
) -> "NDArray[np.float64]":
    """Return the negative log-likelihood of every image, in nats/pixel: float64 [N].

    Args:
        model: of an autoregressive objective.
        images: several images; or a token data set or another source of images of `prepare`.
        precision: of matrix products, "fp32" or "bf16".
        settings: fields of `ImageSetConfig`, which select images of a source, such as `limit=1000`.

    Raises:
        InputError: a setting, the model or the images cannot be used.
    """
    from igpt.data.image_set import ImageSetConfig
    from igpt.evaluation.gather import select_images
    from igpt.evaluation.likelihood import score as run
    from igpt.model.images import split_of_images

    chosen = ImageSetConfig.layered(settings, where="the settings")
    loaded = load_model(model)
    with progress_bar() as show:
        if isinstance(images, str | os.PathLike):
            source = os.fspath(images)
            tokenising = partial(show, "tokenising")
            selected = select_images(loaded, source, chosen, name=_name_of(model))
            split = selected.image_set(tokenising).tokens
        elif settings:
            raise InputError(f"{min(settings)} selects images of a source; images are given here")
        else:
            split = split_of_images(loaded, images)
        return run(loaded, split, precision=precision, progress=partial(show, "scoring"))


def quality(
    model: "ImageGPT | PathName",
    source: PathName,
    *,
    features: "ImageGPT | PathName | None" = None,
    layer: int | None = None,
    samples: int | None = None,
    completions: int | None = None,
    keep_rows: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compare samples and completions of a model with true images, in features of a model.

    Args:
        source: true images: a token data set or another source of images of `prepare`.
        features: the model whose features are compared; the same one by default.
        layer: of these features; by default the best one in the probe of that model.
        samples: number of images to sample for the Frechet distance, 0 for none; as many as there
            are true images by default, and none for a BERT model.
        completions: number of true images to complete, 0 for none; all by default.
        keep_rows: rows that are kept; the upper half by default.
        temperature: see `SamplingSettings`.
        top_k: see `SamplingSettings`.
        top_p: see `SamplingSettings`.
        settings: fields of `ImageSetConfig`, which select true images, such as `limit=1000`; `seed`
            is also that of the samples and of the bootstrap.

    Returns:
        `frechet` and `completions`, see `igpt.evaluation.quality.measure`, and what they are of.

    Raises:
        InputError: a setting, a model or the images cannot be used, or there are too few images.
    """
    from igpt.data.image_set import ImageSetConfig
    from igpt.evaluation.export import layer_of
    from igpt.evaluation.gather import select_images
    from igpt.evaluation.quality import measure
    from igpt.sampling.jobs import SamplingSettings, require_sampling_settings

    chosen = ImageSetConfig.layered(settings, where="the settings")
    sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=chosen.seed)
    require_sampling_settings(**sampling)
    for name, count in (("samples", samples), ("completions", completions)):
        if count is not None and count < 0:
            raise InputError(f"--{name} is 0 or more, not {count}")
    loaded = load_model(model)
    of = loaded if features is None else load_model(features)
    named = model if features is None else features
    layer = layer_of(named, of, layer)
    if samples is None and not loaded.config.trained_as.has_likelihood:
        samples = 0
    with progress_bar() as show:
        selected = select_images(loaded, os.fspath(source), chosen, name=_name_of(model))
        images = selected.image_set(partial(show, "tokenising"))
        found = measure(
            loaded,
            images.tokens,
            of,
            layer,
            sampling,
            samples=len(images) if samples is None else samples,
            completions=len(images) if completions is None else completions,
            keep_rows=loaded.config.resolution // 2 if keep_rows is None else keep_rows,
            show=show,
        )
    names = {
        "model": _name_of(model),
        "features": _name_of(named),
        "layer": layer,
        "layers": of.config.n_layer,
    }
    return {**names, **images.to_json(), "sampling": sampling, **found}


def sample(
    model: "ImageGPT | PathName",
    count: int = 16,
    *,
    classes: str | Sequence[str] = (),
    **settings: Unpack["SamplingSettings"],
) -> "list[Image.Image]":
    """Generate images.

    Args:
        count: number of images, of each class if there are any.
        classes: names of classes of a class-conditional model, such as "cat" or ["cat", "dog"].
        settings: see `SamplingSettings`, such as `temperature=0.9` and `seed=1`.

    Raises:
        InputError: a setting is out of range, the model has no such class, or it cannot generate
            whole images (BERT).
    """
    with progress_bar() as show:
        return load_model(model).sample(
            count, classes=classes, progress=partial(show, "sampling"), **settings
        )


def complete(
    model: "ImageGPT | PathName",
    images: Iterable[Any],
    *,
    keep_rows: int | None = None,
    mask: Any = None,
    completions: int = 4,
    class_name: str | None = None,
    **settings: Unpack["SamplingSettings"],
) -> "list[list[Image.Image]]":
    """Keep the upper rows of images, or the pixels that a mask leaves, and generate the rest.

    Args:
        keep_rows: rows to keep, at the model's resolution; the upper half by default.
        mask: an image whose bright pixels are generated and whose dark ones are kept, instead.
        completions: of each image.
        class_name: class of the images, for a class-conditional model.
        settings: see `SamplingSettings`, such as `temperature=0.9` and `seed=1`.

    Returns:
        the completions of every image.

    Raises:
        InputError: an image or a setting cannot be used, or nothing is left to generate.
    """
    from igpt.model.images import tokens_of_images
    from igpt.sampling.images import complete_images, kept_pixels

    loaded = load_model(model)
    originals = tokens_of_images(loaded, images)
    keep = kept_pixels(loaded, keep_rows, mask)
    with progress_bar() as show:
        return complete_images(
            loaded,
            originals,
            keep,
            completions,
            class_name=class_name,
            progress=partial(show, "completing"),
            **settings,
        )


def load_model(model: "ImageGPT | PathName") -> "ImageGPT":
    """Read a model, and move it to a GPU if there is one; a loaded model is returned unchanged."""
    import torch

    from igpt.model.transformer import ImageGPT

    if isinstance(model, ImageGPT):
        return model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ImageGPT.from_pretrained(os.fspath(model)).to(device)


def _name_of(model: "ImageGPT | PathName") -> str:
    """Return how messages name a model."""
    return os.fspath(model) if isinstance(model, str | os.PathLike) else "MODEL"
