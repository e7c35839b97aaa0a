"""The commands that judge and use models: probe, score, evaluate, features."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from igpt.cli.run import (
    MaybeOut,
    Out,
    file_settings,
    given,
    load_model,
    model_and_run,
    passing_folder,
    require_writable,
)
from igpt.errors import InputError
from igpt.locks import exclusive
from igpt.progress import ProgressBar, progress_bar

if TYPE_CHECKING:
    from igpt.data.image_set import ImageSet, ImageSetConfig
    from igpt.model.transformer import ImageGPT


def probe(
    model: Positional[Path],
    tokens: Positional[Path],
    flags: Any,
    out: MaybeOut = None,
    config: Path | None = None,
    features: Path | None = None,
) -> None:
    """Fit a linear classifier to every layer's features.

    Args:
        model: run or model directory.
        tokens: token data set with labels.
        out: JSON to write, with the classifier in a .safetensors beside it; by default probe.json
            in the run, or here for a model without one.
        config: settings in YAML or JSON; flags override them.
        features: folder to keep the features in; those that it holds already are not made again.
    """
    from igpt.data.tokens.dataset import TokenDataset
    from igpt.evaluation.probe import ProbeConfig, write_probe
    from igpt.evaluation.probe import probe as run
    from igpt.evaluation.probe_classifier import require_replaceable
    from igpt.evaluation.results import PROBE, best_row

    path, home = model_and_run(model)
    settings = ProbeConfig.layered(file_settings(config), given(flags), where="the settings")
    target = out or home / "probe.json"
    if target.suffix != ".json":
        raise InputError(f"a probe is written as .json, not as {target.name}")
    require_writable(target, PROBE)
    require_writable(target.with_suffix(".safetensors"))
    require_replaceable(target.with_suffix(".safetensors"))
    with exclusive(target):
        loaded, data = load_model(path), TokenDataset(tokens)
        with progress_bar() as show, passing_folder(target) as passing:
            result, readout = run(loaded, data, settings, features or passing, progress=show)
        write_probe(target, {"model": str(path), **result}, readout)
    best, images = best_row(result), result["images"]["test"]
    for row in result["layers"]:
        mark = " <- best on validation" if row is best else ""
        print(f"layer {row['layer']:3d}  {_accuracies(row)}{mark}")
    if "concatenated" in result:
        together = result["concatenated"]
        print(f"layers {' '.join(map(str, together['layers']))}  {_accuracies(together)}")
    for few in result.get("few_labels", ()):
        print(
            f"layer {few['layer']:3d}  {few['per_class']} labels a class: test {few['mean']:.4f} "
            f"+- {few['standard_deviation']:.4f} (standard deviation of {len(few['test_accuracies'])} draws)"
        )
    low, high = best["test_interval_95"]
    print(
        f"{target}: layer {best['layer']} reads {best['test_accuracy']:.4f} of {images} test images "
        f"(95 % interval {low:.4f} to {high:.4f})"
    )


def _accuracies(row: Mapping[str, Any]) -> str:
    state = "" if row["converged"] else " (not converged)"
    return f"validation {row['validation_accuracy']:.4f}  test {row['test_accuracy']:.4f}{state}"


def score(
    model: Positional[Path],
    source: Positional[str],
    flags: Any,
    out: MaybeOut = None,
    maps: Path | None = None,
    count: int | None = None,
    against: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Measure how likely images are under a model, in nats/pixel.

    Args:
        model: run or model directory of an autoregressive model.
        source: token data set, or any source of images that igpt prepare takes.
        out: .csv or .jsonl to write, a line an image, with the summary in a .json beside it;
            without it, the summary is score.json in the run, or here for a model without one.
        maps: PNG to write: images above the losses of their pixels.
        count: how many images it shows, evenly over all; by default 8, or as many as there are.
        against: a second source, of which the test images are taken, or all where there are none:
            how well are they told by their higher nats/pixel?
        precision: of the products; bf16 is faster where the processor has it.
    """
    from igpt.data.image_set import ImageSetConfig
    from igpt.evaluation.likelihood import (
        losses_of,
        require_table,
        summary,
        told_apart,
        write_scores,
    )
    from igpt.evaluation.likelihood import score as run
    from igpt.evaluation.loss_maps import draw_maps, require_maps
    from igpt.evaluation.results import SCORE, SCORE_VERSION
    from igpt.files import sha256_of, write_json
    from igpt.model.images import spread_evenly

    settings = ImageSetConfig.layered(given(flags), where="the settings")
    path, home = model_and_run(model)
    target = out.with_suffix(".json") if out else home / "score.json"
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
        result: dict[str, Any] = {"format": SCORE, "version": SCORE_VERSION, "model": str(path)}
        with progress_bar() as show:
            images = _gathered(loaded, source, settings, show)
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
                others = _gathered(loaded, against, other, show)
                theirs = run(
                    loaded, others.tokens, precision=precision, progress=partial(show, "scoring")
                )
                told = told_apart(losses, theirs)
                result["against"] = {**others.to_json(), **summary(theirs), "told_apart": told}
        if maps:
            tokens = images.tokens.rows(shown)
            draw_maps(loaded, tokens, losses_of(loaded, tokens, precision=precision), maps)
            result["maps"] = {"file": str(maps), "rows": images.rows[shown].tolist()}
        if out:
            write_scores(out, images, losses)
            result["scores_sha256"] = sha256_of(out)
        write_json(target, result | _made_with(loaded, settings, precision))
    print(_likelihood(result))
    if against:
        print(_likelihood(result["against"]))
        low, high = told["interval_95"]
        print(
            f"told apart by the higher nats/pixel: AUROC {told['auroc']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        )
        _tell_skipped(others, target)
    _tell_skipped(images, target)
    print(
        f"{target}: the summary{f'; {out}: every image' if out else ''}{f'; {maps}: losses by pixel' if maps else ''}"
    )


def evaluate(
    model: Positional[Path],
    name: Positional[str],
    out: MaybeOut = None,
    limit: int | None = None,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Repeat a published figure: nats/pixel on the test images of OpenAI's released arrays.

    Args:
        model: run or model directory of an autoregressive model.
        name: what the arrays' names begin with: downloads/imagenet for downloads/imagenet_teX.npy,
            with kmeans_centers.npy beside it.
        out: JSON to write; by default published.json in the run, or here for a model without one.
        limit: at most so many images, drawn by seed, for an estimate.
        seed: of the images drawn.
        precision: of the products; bf16 is faster where the processor has it, and rounds the fourth
            digit.
    """
    from igpt.data.image_set import ImageSetConfig
    from igpt.data.sources.archives import TokenRows, open_archive
    from igpt.evaluation.likelihood import score as run
    from igpt.evaluation.likelihood import summary
    from igpt.evaluation.published import FORMAT, VERSION, compared, published_loss
    from igpt.files import write_json

    asked = {"split": "test", "label_column": "none", "limit": limit, "seed": seed}
    settings = ImageSetConfig.layered(asked, where="the settings")
    path, home = model_and_run(model)
    target = out or home / "published.json"
    require_writable(target, FORMAT)
    with exclusive(target):
        arrays = open_archive(name, "none")
        if arrays is None or not isinstance(arrays[0].get("test"), TokenRows):
            raise InputError(
                f"no released arrays: {name}_teX.npy is missing; give what their names begin with"
            )
        loaded = load_model(path)
        loaded.config.trained_as.require("has_likelihood", "a likelihood")
        with progress_bar() as show:
            images = _gathered(loaded, name, settings, show)
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
            result["published"] = compared(found, published, whole=limit is None)
        write_json(target, result | _made_with(loaded, settings, precision))
    print(_likelihood(result))
    print(_beside_published(result.get("published"), name))
    print(f"{target}: the result")


def _beside_published(told: Mapping[str, Any] | None, name: str) -> str:
    if told is None:
        return f"nothing was published for a model of this shape on {Path(name).name}"
    verdict = "agrees" if told["agrees"] else "does not agree"
    return (
        f"published for {told['model']}: {told['nats_per_pixel']:.4f} nats/pixel; this one {verdict} within "
        f"{told['within']} (difference {told['difference']:+.4f})"
    )


def features(
    model: Positional[Path],
    source: Positional[str],
    out: Out,
    flags: Any,
    layer: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Write the features of images for other programs: one layer's activations, averaged over all places.

    Args:
        model: run or model directory.
        source: token data set, or any source of images that igpt prepare takes.
        out: .npz or .parquet to write, with how it was made in a .json beside it.
        layer: 0 is the first block's input, the last one the final norm's output; by default the
            best-probing layer, where the run has a probe.json.
        precision: of the products; bf16 is faster where the processor has it.
    """
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
    from igpt.files import write_json

    settings = ImageSetConfig.layered(given(flags), where="the settings")
    target = out.with_suffix(".json")
    require_features_file(out)
    require_writable(out)
    require_writable(target, FORMAT)
    path, home = model_and_run(model)
    with exclusive(target):
        loaded = load_model(path)
        last = loaded.config.n_layer
        if layer is None and path == home / "model":
            layer = best_layer(home)
        if layer is None:
            raise InputError(
                f"name a layer (--layer 0 to {last}); a run that igpt probe has judged is taken at its best"
            )
        require_layer(layer, last)
        with progress_bar() as show:
            images = _gathered(loaded, source, settings, show)
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
    _tell_skipped(images, target)
    print(
        f"{out}: {len(images)} images, {loaded.config.n_embd} features of layer {layer} of {last}"
    )


def _gathered(
    model: "ImageGPT", source: str, settings: "ImageSetConfig", show: ProgressBar
) -> "ImageSet":
    """The images of a source in the model's tokens: a token data set that matches the model, or any images."""
    from igpt.data.image_set import stored_image_set, tokenized_image_set
    from igpt.data.tokens.dataset import TokenDataset
    from igpt.data.tokens.manifest import FORMAT, MANIFEST
    from igpt.evaluation.features import require_match
    from igpt.files import read_json
    from igpt.model.images import palette_of

    path = Path(source).expanduser()
    # A folder of images may have a dataset.json too: StyleGAN's tools write one.
    if (path / MANIFEST).exists() and read_json(path / MANIFEST, "token data set").get(
        "format"
    ) == FORMAT:
        data = TokenDataset(path)
        require_match(model, data)
        return stored_image_set(data, settings)
    progress = partial(show, "tokenising")
    return tokenized_image_set(
        source, palette_of(model), model.config.resolution, settings, progress
    )


def _made_with(model: "ImageGPT", settings: "ImageSetConfig", precision: str) -> dict[str, Any]:
    from igpt.environment import describe
    from igpt.model.images import palette_of

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
    if palette is None:
        words = "what the palette costs is unknown"
    elif palette["psnr_db"] is None:
        words = f"the palette is exact on {palette['measured_on']}"
    else:
        error = f"{palette['mse']:.1f} a channel, {palette['psnr_db']:.1f} dB PSNR"
        words = f"the palette's mean squared error on {palette['measured_on']} is {error}"
    return (
        f"{result['nats_per_pixel']:.4f} nats/pixel{spread}, {result['bits_per_pixel']:.4f} bits/pixel, over "
        f"{result['images']} {split}images of {result['source']}; {words}"
    )


def _tell_skipped(images: "ImageSet", target: Path) -> None:
    from igpt.cli.data import print_left_out

    what = f"left out when {images.source} was prepared" if images.prepared else "left out"
    print_left_out(images.left_out, images.notes, target, what=what)
