"""The commands that compute values of each image of a source: score, features."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from igpt.api import load_model
from igpt.builtin_models import DEFAULT_MODEL, NAMES, WEIGHTS
from igpt.cli.data import print_left_out
from igpt.cli.parser import argument
from igpt.cli.spread import SpreadOptions
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
        from igpt.evaluation.export import FORMAT, layer_features, layer_of
        from igpt.evaluation.gather import select_images
        from igpt.evaluation.parts import compute

        precision = self.precision
        settings = ImageSetConfig.layered(given, where="the settings")
        model, source = self.model_and_source()
        path, _ = model_and_run(model)
        with nullcontext() if self.shard else exclusive(self.out.with_suffix(".json")):
            loaded = load_model(path)
            layer, last = layer_of(model, loaded, self.layer), loaded.config.n_layer
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
