"""The cost of a pass of the decoder by the number of pixels, next to a step of others.

    python benchmarks/passes.py
    python benchmarks/passes.py --model igpt-l --batches 1

A pass computes a window of pixels of every image, in the middle of the image. transformers and ONNX
Runtime compute one pixel per step. Weights are random, which changes no speed. Contenders
alternate; results are medians.
"""

from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from generate import load
from onnx_contender import Decoding, OnnxContender

from igpt.model.precision import multiplies_bf16
from igpt.sampling.decoder import Decoder


@torch.inference_mode()
def main(
    model: str = "igpt-s",
    batches: tuple[int, ...] = (1, 16),
    windows: tuple[int, ...] = (1, 4, 8, 16),
    rounds: int = 21,
    result: str = "passes",
) -> None:
    """Measure milliseconds per pass.

    Args:
        model: preset, or run or model directory.
        batches: images at a time.
        windows: pixels of an image in a pass.
        rounds: number of turns.
        result: name of the JSON.
    """
    ours, theirs = load(model, torch.device("cpu"))
    config, middle = ours.config, ours.config.n_pixels // 2
    kinds = ["fp32", *(["bf16"] if multiplies_bf16("cpu") else []), "int8"]
    onnx = {kind: OnnxContender(ours, kind) for kind in ("fp32", "int8")}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        contenders: dict[str, Callable[[], object]] = {}
        for kind in kinds:
            decoder = Decoder(ours, batch, kind)
            for window in windows:
                positions = (middle + torch.arange(window)).expand(batch, -1)
                given = (positions % config.n_colors, positions, middle + window)
                contenders[f"igpt {kind}, {window}"] = lambda one=decoder, given=given: one.logits(
                    *given
                )
        for kind, other in theirs.items():
            tokens = torch.zeros(batch, middle, dtype=torch.long)
            cache = other(tokens, use_cache=True).past_key_values

            def step(other: Any = other, cache: Any = cache, batch: int = batch) -> None:
                other(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
                cache.crop(-1)

            contenders[f"transformers {kind}, 1"] = step
        for kind, contender in onnx.items():
            decoding = Decoding(contender, batch, middle)
            zeros = np.zeros(batch, dtype=np.int64)
            contenders[f"ONNX Runtime {kind}, 1"] = lambda one=decoding, last=zeros: one.step(last)
        common.interleaved(contenders, 2)  # chooses kernels and allocates memory
        seconds = common.interleaved(contenders, rounds)
        rows += [
            {"batch": batch, "contender": name, "milliseconds": 1e3 * value}
            for name, value in seconds.items()
        ]
    common.show(
        f"{model}, at position {middle}, ms per pass of some pixels of every image",
        ["batch, contender, pixels", "ms"],
        [[f"{row['batch']}, {row['contender']}", f"{row['milliseconds']:.1f}"] for row in rows],
    )
    common.record(
        result, {"model": model, "rounds": rounds, "threads": torch.get_num_threads(), "rows": rows}
    )


if __name__ == "__main__":
    common.run(main)
