"""The commands that evaluate models: probe, score, features, classify."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from igpt.api import load_model, probe
from igpt.builtin_models import DEFAULT_MODEL, NAMES, WEIGHTS, find_builtin
from igpt.cli.parser import Options, argument
from igpt.errors import InputError
from igpt.locks import exclusive
from igpt.model.locate import model_and_run
from igpt.outputs import require_writable
from igpt.progress import progress_bar

if TYPE_CHECKING:
    from igpt.data.image_set import ImageSet, ImageSetConfig
    from igpt.model.transformer import ImageGPT

_IMAGES = {
    "images": ("split", "limit", "seed", "image_column", "label_column", "stream", "max_bad"),
    "hardware": ("precision",),
}


class Probe(Options):
    """Fit a linear classifier to the features of every layer."""

    settings = "igpt.evaluation.probe:ProbeConfig"
    example = "igpt probe runs/photos tokens/cifar10"
    groups: ClassVar = {
        "data": ("limit", "test_images", "labels_per_class", "subsets", "masks", "seed"),
        "classifier": (
            "layers",
            "concatenate",
            "solver",
            "strengths",
            "learning_rates",
            "steps",
            "batch_size",
            "fold_back",
            "knn",
            "baselines",
        ),
        "hardware": ("precision",),
    }

    model: Path = argument("run, model directory, name of a built-in model, or Hub id")
    tokens: Path = argument("token data set with labels")
    out: Path | None = Field(
        None,
        description="JSON to write, with the classifier in a .safetensors file of the same name; "
        "by default probe.json in the run, or in the current folder for a model without a run",
    )
    config: Path | None = Field(None, description="settings in YAML or JSON; flags override them")
    features: Path | None = Field(
        None, description="folder to keep features in; those that it already holds are reused"
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.evaluation.results import best_row, best_row_by_neighbours

        target = self.out or model_and_run(self.model)[1] / "probe.json"
        result = probe(
            self.model,
            self.tokens,
            out=target,
            features=self.features,
            config=self.config,
            **given,
        )
        best, images = best_row(result), result["images"]["test"]
        for row in result["layers"]:
            mark = "  <- best validation accuracy" if row is best else ""
            print(f"layer {row['layer']:3d}: {_accuracies(row)}{mark}")
        if "concatenated" in result:
            together = result["concatenated"]
            print(f"layers {' '.join(map(str, together['layers']))}: {_accuracies(together)}")
        for few in result.get("few_labels", ()):
            print(
                f"layer {few['layer']:3d}: {few['per_class']} labels per class: test accuracy "
                f"{few['mean']:.1%} +- {few['standard_deviation']:.1%} "
                f"(standard deviation over {len(few['test_accuracies'])} subsets)"
            )
        low, high = best["test_interval_95"]
        print(
            f"{target}: best layer {best['layer']}: test accuracy {best['test_accuracy']:.1%} on "
            f"{images} images (95 % interval {low:.1%} to {high:.1%})"
        )
        if nearest := best_row_by_neighbours(result):
            found = nearest["knn"]
            low, high = found["test_interval_95"]
            print(
                f"{found['k']} nearest neighbours: best layer {nearest['layer']}: test accuracy "
                f"{found['test_accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})"
            )


def _accuracies(row: Mapping[str, Any]) -> str:
    state = "" if row["converged"] else " (not converged)"
    text = (
        f"validation accuracy {row['validation_accuracy']:.1%}, test accuracy "
        f"{row['test_accuracy']:.1%}{state}"
    )
    if nearest := row.get("knn"):
        text += (
            f"; {nearest['k']} nearest neighbours {nearest['validation_accuracy']:.1%}, "
            f"{nearest['test_accuracy']:.1%}"
        )
    return text


class Score(Options):
    """Compute the likelihood of images under a model, in nats/pixel."""

    settings = "igpt.data.image_set:ImageSetConfig"
    example = "igpt score runs/photos tokens/cifar10 --maps losses.png"
    groups = _IMAGES

    model: Path | None = argument(
        "run or model directory of an autoregressive model, name of a built-in one, or Hub id; "
        f"{DEFAULT_MODEL} if there is only one argument, which is the SOURCE",
        default=None,
    )
    source: str = argument(
        "token data set, or any source of images of igpt prepare; with --published, the path of "
        "OpenAI's arrays: downloads/imagenet for downloads/imagenet_teX.npy, with "
        "kmeans_centers.npy in the same folder"
    )
    out: Path | None = Field(
        None,
        description=".csv or .jsonl to write, one line per image, with the summary in a .json file "
        "of the same name; by default only the summary is written, to score-NAME.json in the run, "
        "with the name of SOURCE, or in the current folder for a model without a run",
    )
    maps: Path | None = Field(
        None, description="PNG to write: images above the losses of their pixels"
    )
    count: int | None = Field(
        None, description="number of images in --maps, spread evenly; at most 8 by default"
    )
    against: str | None = Field(
        None,
        description="a second source (its test images, or all if it has none): also compute the "
        "AUROC of separating the two sets by nats/pixel",
    )
    published: bool = Field(
        False,
        description="compare the loss on OpenAI's test arrays with the published one; -o is then a "
        "JSON file, published.json by default",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of matrix products; bf16 is faster if the processor supports it",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        if self.published:
            _compare_published(self, given)
        else:
            _score(self, given)


def _score(options: Score, given: dict[str, Any]) -> None:
    from igpt.data.image_set import ImageSetConfig
    from igpt.evaluation.gather import gather
    from igpt.evaluation.likelihood import (
        losses_of,
        require_table,
        separation_by_loss,
        summary,
        write_scores,
    )
    from igpt.evaluation.likelihood import score as run
    from igpt.evaluation.loss_maps import draw_maps, require_maps
    from igpt.evaluation.results import SCORE, SCORE_VERSION, score_file, source_path
    from igpt.files import sha256_of, write_json
    from igpt.model.images import spread_evenly

    out, maps, count, against = options.out, options.maps, options.count, options.against
    source, precision = options.source, options.precision
    settings = ImageSetConfig.layered(given, where="the settings")
    model = _model_before(options.model, source)
    path, home = model_and_run(model)
    target = out.with_suffix(".json") if out else score_file(home, source, settings.split)
    if out:
        require_table(out)
        require_writable(out)
    if maps:
        require_maps(maps, 8 if count is None else count)
        require_writable(maps)
    elif count is not None:
        raise InputError(
            "--count is the number of images that --maps shows; name a PNG with --maps"
        )
    require_writable(target, SCORE)
    with exclusive(target):
        loaded = load_model(path)
        loaded.config.trained_as.require("has_likelihood", "a likelihood")
        result: dict[str, Any] = {
            "format": SCORE,
            "version": SCORE_VERSION,
            "model": str(path),
            "source_path": source_path(source),
        }
        with progress_bar() as show:
            images = gather(loaded, source, settings, partial(show, "tokenising"), name=model)
            if maps:
                shown = spread_evenly(
                    images.tokens, min(8, len(images)) if count is None else count
                )
            losses = run(
                loaded, images.tokens, precision=precision, progress=partial(show, "scoring")
            )
            result |= {**images.to_json(), **summary(losses)}
            if against:
                columns = {
                    "split": None,
                    "image_column": None,
                    "label_column": None,
                    "stream": False,
                }
                other = settings.model_copy(update=columns)  # those given are of the first source
                others = gather(loaded, against, other, partial(show, "tokenising"), name=model)
                theirs = run(
                    loaded, others.tokens, precision=precision, progress=partial(show, "scoring")
                )
                separation = separation_by_loss(losses, theirs)
                result["against"] = {
                    **others.to_json(),
                    **summary(theirs),
                    "told_apart": separation,
                }
        if maps:
            tokens = images.tokens.rows(shown)
            names = [images.name_of(index) for index in shown.tolist()]
            draw_maps(loaded, tokens, losses_of(loaded, tokens, precision=precision), names, maps)
            result["maps"] = {
                "file": str(maps),
                "sha256": sha256_of(maps),
                "rows": images.rows[shown].tolist(),
            }
        if out:
            write_scores(out, images, losses)
            result["scores_sha256"] = sha256_of(out)
        write_json(target, result | _made_with(loaded, settings, precision))
    print(_likelihood(result))
    if against:
        print(_likelihood(result["against"]))
        low, high = separation["interval_95"]
        print(
            f"AUROC of separating the two sets by nats/pixel: {separation['auroc']:.4f} "
            f"(95 % interval {low:.4f} to {high:.4f})"
        )
        _print_left_out(others, target)
    _print_left_out(images, target)
    written = [f"{target}: summary"]
    if out:
        written.append(f"{out}: every image")
    if maps:
        written.append(f"{maps}: losses of the pixels")
    print("; ".join(written))


def _compare_published(options: Score, given: dict[str, Any]) -> None:
    """Compute the loss on OpenAI's released test arrays and compare it with the published one."""
    from igpt.data.image_set import ImageSetConfig
    from igpt.data.sources.archives import TokenRows, open_archive
    from igpt.evaluation.gather import gather
    from igpt.evaluation.likelihood import score as run
    from igpt.evaluation.likelihood import summary
    from igpt.evaluation.published import FORMAT, VERSION, compared, published_loss
    from igpt.files import write_json

    unused = [name for name in ("maps", "count", "against") if getattr(options, name) is not None]
    unused += sorted(given.keys() - {"limit", "seed"})
    if unused:
        raise InputError(f"--published cannot be combined with --{unused[0].replace('_', '-')}")
    name, precision = options.source, options.precision
    fixed = {"split": "test", "label_column": "none"}
    settings = ImageSetConfig.layered(given, fixed, where="the settings")
    model = _model_before(options.model, name)
    path, home = model_and_run(model)
    target = options.out or home / "published.json"
    require_writable(target, FORMAT)
    with exclusive(target):
        arrays = open_archive(name, "none")
        if arrays is None or not isinstance(arrays[0].get("test"), TokenRows):
            raise InputError(f"OpenAI's arrays are missing: there is no {name}_teX.npy")
        loaded = load_model(path)
        loaded.config.trained_as.require("has_likelihood", "a likelihood")
        with progress_bar() as show:
            images = gather(loaded, name, settings, partial(show, "tokenising"), name=model)
            found = summary(
                run(loaded, images.tokens, precision=precision, progress=partial(show, "scoring"))
            )
        result = {
            "format": FORMAT,
            "version": VERSION,
            "model": str(path),
            **images.to_json(),
            **found,
        }
        published = published_loss(loaded.config, name)
        if published:
            result["published"] = compared(found, published, whole=settings.limit is None)
        write_json(target, result | _made_with(loaded, settings, precision))
    print(_likelihood(result))
    print(_comparison(result.get("published"), name))
    print(f"{target}: the comparison")


def _comparison(found: Mapping[str, Any] | None, name: str) -> str:
    if found is None:
        return f"no loss was published for a model of this shape on {Path(name).name}"
    verdict = "agrees" if found["agrees"] else "does not agree"
    return (
        f"published for {found['model']}: {found['nats_per_pixel']:.4f} nats/pixel; this loss "
        f"{verdict} within {found['within']} (difference {found['difference']:+.4f})"
    )


class Features(Options):
    """Write the features of images for other programs: one layer, averaged over all positions."""

    settings = "igpt.data.image_set:ImageSetConfig"
    example = "igpt features runs/photos photos/ -o features.npz"
    groups = _IMAGES

    model: Path | None = argument(
        "run, model directory, name of a built-in model, or Hub id; "
        f"{DEFAULT_MODEL} if there is only one argument, which is the SOURCE",
        default=None,
    )
    source: str = argument("token data set, or any source of images of igpt prepare")
    out: Path = Field(
        description=".npz or .parquet to write; a .json file of the same name records how it was "
        "made"
    )
    layer: int | None = Field(
        None,
        description="0 is the normalised input of the first block, the last one the output of the "
        "final norm; by default the best layer in the probe.json of the run or built-in model",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of matrix products; bf16 is faster if the processor supports it",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.data.image_set import ImageSetConfig
        from igpt.evaluation.export import (
            FORMAT,
            VERSION,
            best_layer,
            require_features_file,
            require_layer,
            write_features,
        )
        from igpt.evaluation.features import pooled
        from igpt.evaluation.gather import gather
        from igpt.files import write_json

        source, out, layer, precision = self.source, self.out, self.layer, self.precision
        settings = ImageSetConfig.layered(given, where="the settings")
        target = out.with_suffix(".json")
        require_features_file(out)
        require_writable(out)
        require_writable(target, FORMAT)
        model = _model_before(self.model, source)
        path, home = model_and_run(model)
        with exclusive(target):
            loaded = load_model(path)
            last = loaded.config.n_layer
            probed = home if path == home / "model" else find_builtin(path)
            if layer is None and probed:
                layer = best_layer(probed)
            if layer is None:
                raise InputError(
                    f"name a layer (--layer 0 to {last}), or run igpt probe first to use the best "
                    "one"
                )
            require_layer(layer, last)
            with progress_bar() as show:
                images = gather(loaded, source, settings, partial(show, "tokenising"), name=model)
                made = {
                    "format": FORMAT,
                    "version": VERSION,
                    "model": str(path),
                    "layer": layer,
                    "layers": last,
                    "width": loaded.config.n_embd,
                    **images.to_json(),
                    "class_names": images.class_names,
                    **_made_with(loaded, settings, precision),
                }
                progress = partial(show, "features")
                batches = pooled(
                    loaded, images.tokens, precision=precision, last=layer, progress=progress
                )
                write_features(out, images, (batch[layer] for batch in batches), made)
            write_json(target, made)
        _print_left_out(images, target)
        print(
            f"{out}: {len(images)} images, {loaded.config.n_embd} features of layer {layer} of "
            f"{last}"
        )


def _model_before(model: Path | None, source: str) -> Path:
    """Return the model; if only a source was given, the built-in one.

    Raises:
        InputError: the only argument is a model.
    """
    if model is None:
        _require_no_model(source)
    return model or Path(DEFAULT_MODEL)


def _require_no_model(source: str) -> None:
    path, _ = model_and_run(source)
    if source in NAMES or ((path / "config.json").exists() and (path / WEIGHTS).exists()):
        raise InputError(f"{source} is a model; name the images after it")


def _made_with(model: "ImageGPT", settings: "ImageSetConfig", precision: str) -> dict[str, Any]:
    from igpt.environment import describe
    from igpt.model.match import palette_of

    return {
        "resolution": model.config.resolution,
        "palette": {"colors": model.config.n_colors, "fingerprint": palette_of(model).fingerprint},
        "limit": settings.limit,
        "seed": settings.seed,
        "precision": precision,
        "environment": describe(),
    }


def _likelihood(result: Mapping[str, Any]) -> str:
    spread = (
        ""
        if result["standard_error"] is None
        else f" +- {result['standard_error']:.4f} (standard error)"
    )
    split = "" if result["split"] == "all" else f"{result['split']} "
    palette = result["palette_error"]
    is_measured = palette is not None and palette["measured_on"] == "these images"
    images = "these images" if is_measured else "the training images"
    if palette is None:
        words = "the error of the palette is unknown"
    elif palette["psnr_db"] is None:
        words = f"the palette represents {images} without error"
    else:
        error = f"{palette['mse']:.1f} per channel, {palette['psnr_db']:.1f} dB PSNR"
        words = f"the palette's mean squared error on {images} is {error}"
    return (
        f"{result['nats_per_pixel']:.4f} nats/pixel{spread}, {result['bits_per_pixel']:.4f} "
        f"bits/pixel, over {result['images']} {split}images of {result['source']}; {words}"
    )


def _print_left_out(images: "ImageSet", target: Path) -> None:
    from igpt.cli.data import print_left_out

    what = f"left out when {images.source} was prepared" if images.prepared else "left out"
    print_left_out(images.left_out, images.notes, target, what=what)


class Classify(Options):
    """Print the most likely classes of images, with a classifier of igpt finetune."""

    settings = "igpt.model.classifier"
    example = "igpt classify runs/classes cat.jpg dog.png"

    model: Path = argument("run or model directory written by igpt finetune")
    images: tuple[Path, ...] = argument("image files, or folders of images")
    top: int = Field(3, description="number of classes per image")
    masks: int = Field(
        0,
        description="BERT models: the most frequent class over this many masks of 15 % of the "
        "pixels; 5 in the paper",
    )
    seed: int = Field(0, description="seed of the masks")
    out: Path | None = Field(None, description="JSON to write")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        import numpy as np

        from igpt.environment import describe
        from igpt.files import write_json
        from igpt.model.classifier import FORMAT, VERSION, predict
        from igpt.model.images import files_of, tokens_of_files

        paths, top, masks, seed, out = (
            self.images,
            self.top,
            self.masks,
            self.seed,
            self.out,
        )
        if top < 1:
            raise InputError(f"--top is at least 1, not {top}")
        if out:
            require_writable(out, FORMAT)
        path = model_and_run(self.model)[0]
        images, left_out = files_of(paths)
        loaded = load_model(path)
        tokens = tokens_of_files(loaded, images).numpy().astype(np.uint16)
        # All images have row 0, so that the masks of an image do not depend on the other images.
        found = predict(loaded, tokens, np.zeros(len(images), np.int64), masks=masks, seed=seed)
        names = loaded.config.class_names or ()
        answers = []
        for image, (file, ranked) in enumerate(zip(images, found.ranked(), strict=True)):
            classes = [
                {
                    "class": names[index],
                    "probability": float(found.probabilities[image, index]),
                    "votes": int(found.votes[image, index]),
                }
                for index in ranked[:top].tolist()
            ]
            answers.append({"file": str(file), "classes": classes})
            votes = [f" ({one['votes']} of {masks} masks)" if masks else "" for one in classes]
            words = [
                f"{one['class']} {one['probability']:.4f}{said}"
                for one, said in zip(classes, votes, strict=True)
            ]
            print(f"{file}: {', '.join(words)}")
        if left_out:
            print(f"left out: {left_out.text()}{left_out.advice()}")
        if out:
            about = {
                "format": FORMAT,
                "version": VERSION,
                "model": str(path),
                "masks": masks,
                "seed": seed,
                "left_out": left_out.to_json(),
            }
            write_json(out, {**about, "images": answers, "environment": describe()})
