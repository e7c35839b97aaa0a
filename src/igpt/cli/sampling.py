"""The commands that draw: sample, complete, app."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from igpt.cli.run import MaybeOut, load_model, model_and_run, require_writable
from igpt.errors import InputError
from igpt.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor


def sample(
    model: Positional[Path],
    out: MaybeOut = None,
    count: int = 16,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Draw images from a model.

    Args:
        model: run or model directory.
        out: PNG to write; by default samples.png in the run, or here for a model without one.
        count: images.
        temperature: 1 is the model's own distribution, as in the paper; 0 takes the likeliest
            colours.
        top_k: only the k likeliest colours of every pixel.
        top_p: only the likeliest colours that together reach this probability.
        seed: the same seed gives the same images.
        precision: of the products; auto takes bf16 where the processor has it.
    """
    from igpt.sampling.grids import require_target, save_samples
    from igpt.sampling.sampler import SamplingSettings, require_sampling_settings

    path, home = model_and_run(model)
    target = out or home / "samples.png"
    settings = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, precision=precision
    )
    require_target(target)
    require_writable(target)
    require_sampling_settings(**settings)
    loaded = load_model(path)
    with progress_bar() as show:
        save_samples(loaded, target, count, settings, partial(show, "sampling"))
    print(f"{target}: {count} samples")


def complete(
    model: Positional[Path],
    images: Positional[tuple[Path, ...]] = (),
    tokens: Path | None = None,
    count: int = 8,
    keep_rows: int | None = None,
    mask: Path | None = None,
    completions: int = 4,
    out: MaybeOut = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Keep the upper rows of images, or what a mask leaves, and draw the rest by a model.

    Args:
        model: run or model directory.
        images: image files.
        tokens: token data set whose test images are taken instead, evenly over the split.
        count: how many of them.
        keep_rows: rows to keep, at the model's resolution; the upper half by default.
        mask: picture whose bright pixels are drawn and whose dark or transparent ones are kept,
            instead of rows.
        completions: drawings of each image.
        out: PNG to write; by default completions.png in the run, or here for a model without one.
        temperature: 1 is the model's own distribution; 0 takes the likeliest colours.
        top_k: only the k likeliest colours of every pixel.
        top_p: only the likeliest colours that together reach this probability.
        seed: the same seed gives the same drawings.
        precision: of the products; auto takes bf16 where the processor has it.
    """
    from igpt.data.tokens.dataset import TokenDataset
    from igpt.evaluation.features import require_match
    from igpt.model.images import tokens_of_files, tokens_of_split
    from igpt.sampling.grids import mask_of_file, require_target, save_completions
    from igpt.sampling.sampler import SamplingSettings, require_sampling_settings

    if bool(images) == bool(tokens):
        raise InputError("give image files to complete, or --tokens with a token data set")
    if mask and keep_rows is not None:
        raise InputError("give --keep-rows or --mask, not both")
    path, home = model_and_run(model)
    target = out or home / "completions.png"
    settings = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, precision=precision
    )
    require_target(target)
    require_writable(target)
    require_sampling_settings(**settings)
    if target.resolve() in {file.resolve() for file in (*images, *([mask] if mask else []))}:
        raise InputError(f"{target} is one of the pictures to read; choose another -o")
    loaded = load_model(path)
    if tokens:
        data = TokenDataset(tokens)
        require_match(loaded, data)
        originals = tokens_of_split(data["test"], count)
    else:
        originals = tokens_of_files(loaded, images)
    keep: int | Tensor = loaded.config.resolution // 2 if keep_rows is None else keep_rows
    kept = f"{keep} rows"
    if mask:
        keep = mask_of_file(loaded, mask)
        left = int(keep.sum())
        kept = (
            f"{left} of {len(keep)} pixels, by {mask}"
            if left
            else f"nothing: {mask} hides the whole image"
        )
    with progress_bar() as show:
        save_completions(
            loaded, originals, target, keep, completions, settings, partial(show, "completing")
        )
    print(
        f"{target}: from left to right, each original, what was kept ({kept}), {completions} completions"
    )


def app(model: Positional[Path], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Open a web page that completes, scores and draws images.

    Args:
        model: run or model directory.
        host: address to listen at; loopback only by default.
        port: port to listen at.
    """
    from igpt.webapp.server import serve

    path, home = model_and_run(model)
    serve(load_model(path), host, port, home if path == home / "model" else None)
