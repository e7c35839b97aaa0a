"""The commands that evaluate models: probe, score, features, quality, classify."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from igpt.api import load_model, probe, quality
from igpt.builtin_models import DEFAULT_MODEL, NAMES, WEIGHTS
from igpt.cli.data import SpreadOptions, print_left_out
from igpt.cli.parser import Options, argument
from igpt.errors import InputError
from igpt.locks import exclusive
from igpt.model.locate import model_and_run
from igpt.outputs import require_writable
from igpt.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from igpt.data.image_set import ImageSet, ImageSetConfig, Selection
    from igpt.evaluation.parts import Measure, Merged, Values
    from igpt.model.transformer import ImageGPT


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
            "by_likelihood",
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
        if found := result.get("by_likelihood"):
            low, high = found["test_interval_95"]
            print(
                f"likelihood given each class: test accuracy {found['test_accuracy']:.1%} (95 % "
                f"interval {low:.1%} to {high:.1%})"
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


class _OfImages(SpreadOptions):
    """The options of commands that compute a value of each image of a source."""

    settings = "igpt.data.image_set:ImageSetConfig"
    groups: ClassVar = {
        "images": ("split", "limit", "seed", "image_column", "label_column", "stream", "max_bad"),
        "hardware": ("precision",),
        "several machines": ("engine", "address", "shard", "merge"),
    }

    model: Path | None = argument(
        "run, model directory, name of a built-in model, or Hub id; "
        f"{DEFAULT_MODEL} if there is only one argument, which is the SOURCE",
        default=None,
    )
    source: str = argument("token data set, or any source of images of igpt prepare", default="")
    out: Path | None = None
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of matrix products; bf16 is faster if the processor supports it",
    )

    def model_and_source(self) -> tuple[Path, str]:
        """Return the model and the source; if only a source was given, the built-in model.

        Raises:
            InputError: the only argument is a model, or there is none.
        """
        if self.model is None:
            raise InputError("name a SOURCE of images")
        if self.source:
            return self.model, self.source
        only = str(self.model)
        path, _ = model_and_run(only)
        if only in NAMES or ((path / "config.json").exists() and (path / WEIGHTS).exists()):
            raise InputError(f"{only} is a model; name the images after it")
        return Path(DEFAULT_MODEL), only

    def require_fitting_flags(self, given: Mapping[str, Any], *undivided: str) -> None:
        """Refuse flags that cannot be combined with --shard or --merge.

        Args:
            given: the settings that were given as flags.
            undivided: flags whose results are not computed in parts.
        """
        self.cluster()
        if (self.shard or self.merge) and self.out is None:
            raise InputError("name the output that the parts belong to: -o OUT")
        for name in undivided:
            if self.shard and getattr(self, name):
                raise InputError(f"--{name} is not computed in parts; leave --shard out")
        if not self.merge:
            return
        if self.model:
            raise InputError("--merge takes no MODEL or SOURCE: it merges the parts of OUT")
        if more := sorted((self.model_fields_set | given.keys()) - {"merge", "out"}):
            raise InputError(
                f"--{more[0].replace('_', '-')} is a setting of the parts; --merge takes only -o"
            )

    def write_part(
        self,
        model: "ImageGPT",
        selection: "Selection",
        measure: "Measure",
        of: Mapping[str, Any],
        made: dict[str, Any],
        phase: str,
    ) -> None:
        """Compute and write the part of --shard.

        Args:
            of: what the parts have in common, in addition to the model and the images.
            made: what the results contain in addition to those of the images.
            phase: title of the progress bar.
        """
        from igpt.data.parts import part_number
        from igpt.evaluation.parts import write_part
        from igpt.model.cost import inference_batch_size
        from igpt.model.directory import weights_sha256

        assert self.shard
        assert self.out
        common = {
            **of,
            "model_sha256": weights_sha256(model.state_dict()),
            "batch_size": inference_batch_size(model.config),
            **{key: made[key] for key in ("palette", "limit", "seed", "precision")},
        }
        with progress_bar() as show:
            part = write_part(
                self.out,
                part_number(self.shard),
                model,
                selection,
                measure,
                of=common,
                result=made,
                reading=partial(show, "tokenising"),
                measuring=partial(show, phase),
            )
        print(
            f"{part}: part {self.shard}; when all parts are there, merge them: igpt "
            f"{type(self).__name__.lower()} --merge -o {self.out}"
        )

    def merged_parts(self, kind: str) -> "Merged":
        """Return the values of all parts of -o; the result has this process's environment."""
        from igpt.environment import describe
        from igpt.evaluation.parts import merge

        assert self.out
        merged = merge(self.out, kind, f"igpt {type(self).__name__.lower()} MODEL SOURCE")
        merged.result["environment"] = describe()
        return merged


class Score(_OfImages):
    """Compute the likelihood of images under a model, in nats/pixel."""

    example = "igpt score runs/photos tokens/cifar10 --maps losses.png"

    model: Path | None = argument(
        "run or model directory of an autoregressive model, name of a built-in one, or Hub id; "
        f"{DEFAULT_MODEL} if there is only one argument, which is the SOURCE",
        default=None,
    )
    source: str = argument(
        "token data set, or any source of images of igpt prepare; with --published, the path of "
        "OpenAI's arrays: downloads/imagenet for downloads/imagenet_teX.npy, with "
        "kmeans_centers.npy in the same folder",
        default="",
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

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        self.require_fitting_flags(given, "maps", "against", "published")
        if self.merge:
            _merge_scores(self)
        elif self.published:
            _compare_published(self, given)
        else:
            _score(self, given)


def _score(options: Score, given: dict[str, Any]) -> None:
    import numpy as np

    from igpt.data.image_set import ImageSetConfig
    from igpt.evaluation.gather import select_images
    from igpt.evaluation.likelihood import (
        losses_of,
        losses_of_images,
        require_table,
        separation_by_loss,
        summary,
    )
    from igpt.evaluation.loss_maps import draw_maps, require_maps
    from igpt.evaluation.parts import compute
    from igpt.evaluation.results import SCORE, score_file, source_path
    from igpt.files import sha256_of
    from igpt.model.images import spread_evenly

    out, maps, count, against = options.out, options.maps, options.count, options.against
    precision = options.precision
    settings = ImageSetConfig.layered(given, where="the settings")
    model, source = options.model_and_source()
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
    about: dict[str, Any] = {"model": str(path), "source_path": source_path(source)}
    measure = partial(losses_of_images, precision=precision)
    if options.shard:
        loaded = _load_likelihood(path)
        selection = select_images(loaded, source, settings, name=model)
        made = about | _made_with(loaded, settings, precision)
        options.write_part(loaded, selection, measure, {"kind": SCORE}, made, "scoring")
        return
    more: dict[str, Any] = {}
    others = None
    with exclusive(target):
        loaded = _load_likelihood(path)
        with progress_bar() as show:
            phases: Any = {
                "cluster": options.cluster(),
                "reading": partial(show, "tokenising"),
                "measuring": partial(show, "scoring"),
            }
            selection = select_images(loaded, source, settings, name=model)
            images, batches = compute(loaded, selection, measure, **phases)
            if maps:
                shown = spread_evenly(
                    images.tokens, min(8, len(images)) if count is None else count
                )
            losses = np.concatenate(list(batches))
            if against:
                columns = {
                    "split": None,
                    "image_column": None,
                    "label_column": None,
                    "stream": False,
                }
                other = settings.model_copy(update=columns)  # those given are of the first source
                selection = select_images(loaded, against, other, name=model)
                others, batches = compute(loaded, selection, measure, **phases)
                theirs = np.concatenate(list(batches))
                more["against"] = {
                    **others.to_json(),
                    **summary(theirs),
                    "told_apart": separation_by_loss(losses, theirs),
                }
        if maps:
            tokens = images.tokens.rows(shown)
            names = [images.name_of(index) for index in shown.tolist()]
            draw_maps(loaded, tokens, losses_of(loaded, tokens, precision=precision), names, maps)
            more["maps"] = {
                "file": str(maps),
                "sha256": sha256_of(maps),
                "rows": images.rows[shown].tolist(),
            }
        made = about | more | _made_with(loaded, settings, precision)
        _write_score(out, target, images, losses, made)
    if others:
        low, high = more["against"]["told_apart"]["interval_95"]
        print(_likelihood(more["against"]))
        print(
            f"AUROC of separating the two sets by nats/pixel: "
            f"{more['against']['told_apart']['auroc']:.4f} "
            f"(95 % interval {low:.4f} to {high:.4f})"
        )
        _print_left_out(others, target)
    _print_left_out(images, target)
    _print_written(out, target, maps)


def _write_score(
    out: Path | None,
    target: Path,
    images: "ImageSet",
    losses: "NDArray[np.float64]",
    made: Mapping[str, Any],
) -> None:
    """Write the summary, and a line per image if asked for; print the summary.

    Args:
        made: what the summary contains in addition.
    """
    from igpt.evaluation.likelihood import summary, write_scores
    from igpt.evaluation.results import SCORE, SCORE_VERSION
    from igpt.files import sha256_of, write_json

    result = {"format": SCORE, "version": SCORE_VERSION, **images.to_json(), **summary(losses)}
    if out:
        write_scores(out, images, losses)
        result["scores_sha256"] = sha256_of(out)
    write_json(target, result | dict(made))
    print(_likelihood(result))


def _print_written(out: Path | None, target: Path, maps: Path | None) -> None:
    written = [f"{target}: summary"]
    if out:
        written.append(f"{out}: every image")
    if maps:
        written.append(f"{maps}: losses of the pixels")
    print("; ".join(written))


def _merge_scores(options: Score) -> None:
    import numpy as np

    from igpt.evaluation.likelihood import require_table
    from igpt.evaluation.results import SCORE

    out = options.out
    assert out
    target = out.with_suffix(".json")
    require_table(out)
    require_writable(out)
    require_writable(target, SCORE)
    with exclusive(target):
        merged = options.merged_parts(SCORE)
        _write_score(out, target, merged.images, np.concatenate(list(merged.values)), merged.result)
    _print_left_out(merged.images, target)
    _print_written(out, target, None)


def _load_likelihood(path: Path) -> "ImageGPT":
    loaded = load_model(path)
    loaded.config.trained_as.require("has_likelihood", "a likelihood")
    return loaded


def _compare_published(options: Score, given: dict[str, Any]) -> None:
    """Compute the loss on OpenAI's released test arrays and compare it with the published one."""
    from igpt.data.image_set import ImageSetConfig
    from igpt.data.sources.archives import TokenRows, open_archive
    from igpt.evaluation.gather import select_images
    from igpt.evaluation.likelihood import score as run
    from igpt.evaluation.likelihood import summary
    from igpt.evaluation.published import FORMAT, VERSION, compared, published_loss
    from igpt.files import write_json

    unused = [name for name in ("maps", "count", "against") if getattr(options, name) is not None]
    unused += sorted(given.keys() - {"limit", "seed"})
    unused += ["engine"] if options.engine == "ray" else []
    if unused:
        raise InputError(f"--published cannot be combined with --{unused[0].replace('_', '-')}")
    precision = options.precision
    fixed = {"split": "test", "label_column": "none"}
    settings = ImageSetConfig.layered(given, fixed, where="the settings")
    model, name = options.model_and_source()
    path, home = model_and_run(model)
    target = options.out or home / "published.json"
    require_writable(target, FORMAT)
    with exclusive(target):
        arrays = open_archive(name, "none")
        if arrays is None or not isinstance(arrays[0].get("test"), TokenRows):
            raise InputError(f"OpenAI's arrays are missing: there is no {name}_teX.npy")
        loaded = _load_likelihood(path)
        with progress_bar() as show:
            selection = select_images(loaded, name, settings, name=model)
            images = selection.image_set(partial(show, "tokenising"))
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


class Features(_OfImages):
    """Write the features of images for other programs: one layer, averaged over all positions."""

    example = "igpt features runs/photos photos/ -o features.npz"

    out: Path = Field(
        description=".npz or .parquet to write; a .json file of the same name records how it was "
        "made"
    )
    layer: int | None = Field(
        None,
        description="0 is the normalised input of the first block, the last one the output of the "
        "final norm; by default the best layer in the probe.json of the run or built-in model",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.evaluation.export import FORMAT, require_features_file

        self.require_fitting_flags(given)
        require_features_file(self.out)
        require_writable(self.out)
        require_writable(self.out.with_suffix(".json"), FORMAT)
        if self.merge:
            with exclusive(self.out.with_suffix(".json")):
                merged = self.merged_parts(FORMAT)
                self._write(merged.images, merged.values, merged.result)
        else:
            self._compute(given)

    def _compute(self, given: dict[str, Any]) -> None:
        from igpt.data.image_set import ImageSetConfig
        from igpt.evaluation.export import FORMAT, default_layer, layer_features, require_layer
        from igpt.evaluation.gather import select_images
        from igpt.evaluation.parts import compute

        layer, precision = self.layer, self.precision
        settings = ImageSetConfig.layered(given, where="the settings")
        model, source = self.model_and_source()
        path, _ = model_and_run(model)
        with nullcontext() if self.shard else exclusive(self.out.with_suffix(".json")):
            loaded = load_model(path)
            last = loaded.config.n_layer
            if layer is None:
                layer = default_layer(model)
            if layer is None:
                raise InputError(
                    f"name a layer (--layer 0 to {last}), or run igpt probe first to use the best "
                    "one"
                )
            require_layer(layer, last)
            made = {
                "model": str(path),
                "layer": layer,
                "layers": last,
                "width": loaded.config.n_embd,
                **_made_with(loaded, settings, precision),
            }
            measure = partial(layer_features, layer=layer, precision=precision)
            selection = select_images(loaded, source, settings, name=model)
            if self.shard:
                of = {"kind": FORMAT, "layer": layer}
                self.write_part(loaded, selection, measure, of, made, "features")
                return
            with progress_bar() as show:
                images, batches = compute(
                    loaded,
                    selection,
                    measure,
                    cluster=self.cluster(),
                    reading=partial(show, "tokenising"),
                    measuring=partial(show, "features"),
                )
                self._write(images, batches, made)

    def _write(self, images: "ImageSet", batches: "Values", made: Mapping[str, Any]) -> None:
        """Write the features and how they were made.

        Args:
            made: what the metadata contains in addition to the images.
        """
        from igpt.evaluation.export import FORMAT, VERSION, write_features
        from igpt.files import write_json

        target = self.out.with_suffix(".json")
        content = {
            "format": FORMAT,
            "version": VERSION,
            **images.to_json(),
            "class_names": images.class_names,
            **made,
        }
        write_features(self.out, images, batches, content)
        write_json(target, content)
        _print_left_out(images, target)
        print(
            f"{self.out}: {len(images)} images, {made['width']} features of layer {made['layer']} "
            f"of {made['layers']}"
        )


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
    what = f"left out when {images.source} was prepared" if images.prepared else "left out"
    print_left_out(images.left_out, images.notes, target, what=what)


class Quality(Options):
    """Compare samples and completions of a model with true images, in features of a model."""

    settings = "igpt.data.image_set:ImageSetConfig"
    example = "igpt quality runs/photos tokens/cifar10 --limit 2000"
    groups: ClassVar = {
        "images": ("split", "limit", "seed", "image_column", "label_column", "stream", "max_bad"),
        "samples": ("samples", "completions", "keep_rows", "temperature", "top_k", "top_p"),
        "features": ("features", "layer"),
    }

    model: Path = argument("run, model directory, name of a built-in model, or Hub id")
    source: str = argument("true images: token data set, or any source of images of igpt prepare")
    out: Path | None = Field(
        None,
        description="JSON to write; by default quality.json in the run, or in the current folder "
        "for a model without a run",
    )
    samples: int | None = Field(
        None,
        description="number of images to sample for the Frechet distance, 0 for none; by default "
        "as many as true images (none for BERT models)",
    )
    completions: int | None = Field(
        None, description="number of true images to complete, 0 for none; by default all"
    )
    keep_rows: int | None = Field(
        None, description="rows that are kept in completions; the upper half by default"
    )
    temperature: float = Field(
        1.0,
        description="1 samples from the model's distribution, 0 selects the most likely colours",
    )
    top_k: int | None = Field(None, description="only the k most likely colours of every pixel")
    top_p: float | None = Field(
        None, description="only the most likely colours whose probabilities add up to this value"
    )
    features: Path | None = Field(
        None, description="model whose features are compared; by default MODEL itself"
    )
    layer: int | None = Field(
        None, description="of the features; by default the best layer in the probe of that model"
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.environment import describe
        from igpt.evaluation.quality import FORMAT, VERSION
        from igpt.files import write_json

        target = self.out or model_and_run(self.model)[1] / "quality.json"
        require_writable(target, FORMAT)
        own = (*self.groups["samples"], *self.groups["features"])
        with exclusive(target):
            chosen: dict[str, Any] = {name: getattr(self, name) for name in own}
            result = quality(self.model, self.source, **chosen, **given)
            about = {"format": FORMAT, "version": VERSION, **result, "environment": describe()}
            write_json(target, about)
        where = f"features of layer {result['layer']} of {result['layers']} of {result['features']}"
        if found := result.get("frechet"):
            low, high = found["interval_95"]
            sampled, true = found["images"]
            print(
                f"Frechet distance {found['distance']:.4g} (95 % interval {low:.4g} to {high:.4g}, "
                f"by bootstrap) of {sampled} samples to {true} true images, in {where}"
            )
        if found := result.get("completions"):
            low, high = found["interval_95"]
            print(
                f"completions: {found['mean']:.1%} of other images are nearer than the true one "
                f"(95 % interval {low:.1%} to {high:.1%}; chance 50 %), over {found['count']} "
                f"images with {found['keep_rows']} rows given; with the hidden pixels of another "
                f"image {found['other_pixels']['mean']:.1%}"
            )
        print(f"{target}: all numbers")


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
        from igpt.statistics import accuracy_of

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
        # Samples and sorted images are in folders named as their classes.
        sorted_in = np.array([file.resolve().parent.name for file in images])
        named = np.isin(sorted_in, names)
        accuracy = None
        if named.any():
            accuracy = accuracy_of(np.array(names)[found.classes[named]] == sorted_in[named])
            low, high = accuracy["interval_95"]
            print(
                f"accuracy {accuracy['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) on "
                f"{accuracy['images']} images in folders named as their classes"
            )
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
                "accuracy": accuracy,
            }
            write_json(out, {**about, "images": answers, "environment": describe()})
