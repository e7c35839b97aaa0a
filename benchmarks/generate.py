"""Generation of whole images by a trained model, next to transformers and ONNX Runtime.

    python benchmarks/generate.py --model runs/photos                     # CPU: batches 1 and 16
    python benchmarks/generate.py --model runs/photos --batches 1 64 256  # GPU
    python benchmarks/generate.py --model igpt-s --pixels 128 --rounds 1  # random weights

All contenders have the same weights and alternate; results are medians. Samples of igpt need fewer
passes when guesses are right, so that its speed depends on the model and the images: random weights
say nothing about it (see passes.py for the cost of a pass). transformers and ONNX Runtime compute
one pixel of every image per step. transformers' model has no position for the last pixel, because
its start token takes one.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from onnx_contender import OnnxContender
from transformers import ImageGPTForCausalImageModeling

from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.precision import TYPES, multiplies_bf16
from igpt.model.transformer import ImageGPT
from igpt.sampling.decoder import Decoder
from igpt.sampling.sampler import complete
from igpt.training.presets import MODELS, preset


def load(model: str, device: torch.device) -> tuple[ImageGPT, dict[str, Any]]:
    """Return a model and the same model of transformers in every precision that is timed.

    Args:
        model: run or model directory, or a preset, which gets random weights.

    Raises:
        InputError: transformers cannot compute the model.
    """
    if model in MODELS:
        torch.manual_seed(0)
        settings = {k: v for k, v in preset(model).items() if k in ModelConfig.model_fields}
        ours = ImageGPT(ModelConfig.layered(settings))
        torch.nn.init.normal_(ours.lm_head.weight, std=0.2)
    else:
        folder = Path(model) / "model"
        ours = ImageGPT.from_pretrained(folder if folder.is_dir() else Path(model))
    if not ours.config.faithful:
        raise InputError(f"{model} is a variant, which transformers cannot compute")
    kinds = ("fp32", "bf16") if multiplies_bf16(device.type) else ("fp32",)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder) / "model")
        theirs = {
            kind: ImageGPTForCausalImageModeling.from_pretrained(
                Path(folder) / "model", dtype=TYPES[kind]
            )
            for kind in kinds
        }
    theirs = {kind: other.to(device).eval() for kind, other in theirs.items()}
    return ours.to(device).eval(), theirs


@contextmanager
def counted() -> Iterator[list[int]]:
    """Return a list that grows by one with every pass of a decoder."""
    passes: list[int] = []
    logits = Decoder.logits

    def count(self: Decoder, *given: Any) -> torch.Tensor:
        passes.append(1)
        return logits(self, *given)

    Decoder.logits = count  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        Decoder.logits = logits  # type: ignore[method-assign]


def contenders_of(
    ours: ImageGPT,
    theirs: dict[str, Any],
    onnx: dict[str, OnnxContender],
    kinds: list[str],
    batch: int,
    n: int,
    full_passes: int,
) -> dict[str, Callable[[], None]]:
    """Return functions that generate the first n pixels of a batch of images."""
    config, device = ours.config, ours.device
    start = torch.full((batch, 1), config.n_colors, device=device)
    empty = torch.zeros(batch, config.n_pixels, dtype=torch.long, device=device)
    unknown = torch.arange(config.n_pixels, device=device) < n
    seeds = iter(range(10_000))

    def generated(kind: str, window: int | None = None) -> Callable[[], None]:
        def run() -> None:
            complete(ours, empty, ~unknown, seed=next(seeds), precision=kind, window=window)
            synchronize(device)

        return run

    def by_transformers(kind: str) -> Callable[[], None]:
        length = {"max_new_tokens": n - 1, "min_new_tokens": n - 1}

        def run() -> None:
            theirs[kind].generate(
                start, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None, **length
            )
            synchronize(device)

        return run

    @torch.inference_mode()
    def full(images: torch.Tensor = empty) -> None:
        for _ in range(full_passes):
            theirs["fp32"](images, use_cache=False)
        synchronize(device)

    contenders = {f"igpt {kind}": generated(kind) for kind in kinds}
    contenders["igpt fp32, a pixel per pass"] = generated("fp32", 1)
    contenders |= {f"transformers {kind}": by_transformers(kind) for kind in theirs}
    for kind, contender in onnx.items():
        contenders[f"ONNX Runtime {kind}"] = partial(contender.generate, batch, n)
    contenders["full passes"] = full
    return contenders


def main(
    model: str,
    batches: tuple[int, ...] = (1, 16),
    rounds: int = 3,
    pixels: int | None = None,
    full_passes: int = 1,
    result: str = "generate",
) -> None:
    """Measure seconds per image.

    Args:
        model: run or model directory, or a preset.
        batches: images at a time.
        rounds: number of turns.
        pixels: generate only the first ones.
        full_passes: number of passes over all pixels to time, as of a decoder without a cache.
        result: name of the JSON.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, theirs = load(model, device)
    config, on_cpu = ours.config, device.type == "cpu"
    n = min(pixels or config.n_pixels, config.n_pixels)
    kinds = ["fp32", *(["bf16"] if multiplies_bf16(device.type) else []), *["int8"] * on_cpu]
    onnx = {kind: OnnxContender(ours, kind) for kind in ("fp32", "int8")} if on_cpu else {}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        contenders = contenders_of(ours, theirs, onnx, kinds, batch, n, full_passes)
        seconds = common.interleaved(contenders, rounds)
        seconds = {
            name: value / batch * (n / (n - 1) if name.startswith("transformers") else 1)
            for name, value in seconds.items()
        }
        seconds["full passes"] *= n / full_passes
        per_pass = {}
        for kind in kinds:
            with counted() as passes:
                contenders[f"igpt {kind}"]()
            per_pass[f"igpt {kind}"] = n / len(passes)
        for name, value in seconds.items():
            rows.append(
                {
                    "batch": batch,
                    "contender": name,
                    "seconds_per_image": value,
                    "pixels_per_second": n / value,
                    "pixels_per_pass": per_pass.get(name),
                }
                | {f"{kind}_over_this": value / seconds[f"igpt {kind}"] for kind in kinds}
            )
    common.show(
        f"{model}, {config.resolution} px, {n} pixels; ratios: this contender's time over igpt's",
        ["batch, contender", "s/image", "pixels/pass", *(f"over {kind}" for kind in kinds)],
        [
            [
                f"{row['batch']}, {row['contender']}",
                f"{row['seconds_per_image']:.2f}",
                f"{row['pixels_per_pass']:.2f}" if row["pixels_per_pass"] else "",
                *(f"{row[f'{kind}_over_this']:.2f}" for kind in kinds),
            ]
            for row in rows
        ],
    )
    used = {"model": model, "shape": config.model_dump(), "pixels": n, "rounds": rounds}
    common.record(result, {**used, "threads": torch.get_num_threads(), "rows": rows})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    common.run(main)
