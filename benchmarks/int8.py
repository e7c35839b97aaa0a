"""int8 weights for sampling: the time of products by shape and rows, the loss, and the samples.

    python benchmarks/int8.py --model runs/photos --tokens tokens/photos

Kernels are timed on the products of 24 layers, so that the weights come from memory as in a pass.
The loss is that of test images; with equal noise, the same prefixes are continued in every
precision, and pixels that differ from those in fp32 are counted at the first difference of an image
and over whole images.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F

from igpt.data.tokens.dataset import TokenDataset
from igpt.model.objectives import pixel_losses
from igpt.model.precision import multiplies_bf16
from igpt.model.transformer import ImageGPT
from igpt.sampling.decoder import Decoder
from igpt.sampling.products import product
from igpt.sampling.sampler import complete

_LAYERS = 24
_ROWS = 8  # for which oneDNN lays out weights, as in products.py


def kernels(inputs: int, outputs: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """Return functions that multiply with the weights of 24 layers."""
    weights = [0.02 * torch.randn(outputs, inputs) for _ in range(_LAYERS)]
    contenders: dict[str, list[Any]] = {
        f"igpt {kind}": [product(weight, None, kind) for weight in weights]
        for kind in ("fp32", *(["bf16"] if multiplies_bf16("cpu") else []), "int8")
    }
    reorder = torch.ops.mkldnn._reorder_linear_weight
    multiply = torch.ops.mkldnn._linear_pointwise
    packed = [reorder(weight, _ROWS) for weight in weights]
    turned = [weight.t().contiguous() for weight in weights]
    scales = [weight.abs().amax(1) / 127 for weight in weights]
    whole = [
        (weight / scale[:, None]).round().to(torch.int8)
        for weight, scale in zip(weights, scales, strict=True)
    ]
    dynamic = [
        torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(
                weight, scale.double(), torch.zeros(outputs, dtype=torch.long), 0, torch.qint8
            ),
            None,
        )
        for weight, scale in zip(weights, scales, strict=True)
    ]
    contenders |= {
        "F.linear fp32": [lambda x, w=weight: F.linear(x, w) for weight in weights],
        "mm, transposed fp32": [lambda x, w=weight: torch.mm(x, w) for weight in turned],
        "oneDNN, packed fp32": [
            lambda x, w=weight: multiply(x, w, None, "none", [], "") for weight in packed
        ],
        "linear_dynamic int8": [
            lambda x, w=weight: torch.ops.quantized.linear_dynamic(x, w) for weight in dynamic
        ],
        "weight_int8pack_mm": [
            lambda x, w=weight, s=scale: torch._weight_int8pack_mm(x.bfloat16(), w, s)
            for weight, scale in zip(whole, [scale.bfloat16() for scale in scales], strict=True)
        ],
    }
    return {
        name: lambda x, products=products: [one(x) for one in products]
        for name, products in contenders.items()
    }


@torch.inference_mode()
def losses(model: ImageGPT, tokens: torch.Tensor, precision: Any, size: int = 64) -> float:
    """Return the loss of images in nats/pixel, computed by the decoder: tokens [B, n]."""
    batch, n = tokens.shape
    sequence = torch.cat([torch.full((batch, 1), model.config.n_colors), tokens], 1)
    decoder, total = Decoder(model, batch, precision), 0.0
    for positions in torch.arange(n).split(size):
        rows = positions.expand(batch, -1)
        logits = decoder.logits(sequence[:, positions], rows, int(positions[-1]) + 1)
        total += float(pixel_losses(logits, tokens[:, positions]).double().sum())
    return total / (batch * n)


def main(
    model: Path,
    tokens: Path,
    images: int = 256,
    completions: int = 16,
    rows: tuple[int, ...] = (1, 4, 8, 16, 64),
    shapes: tuple[tuple[int, int], ...] = ((512, 1536), (512, 512), (512, 2048), (2048, 512)),
    rounds: int = 7,
    result: str = "int8",
) -> None:
    """Measure times, losses and samples.

    Args:
        model: run or model directory.
        tokens: token data set, whose test images are used.
        images: number of images for the loss.
        completions: number of images whose lower halves are generated.
        rows: of the products.
        shapes: (inputs, outputs) of the products.
        rounds: number of turns of the times.
        result: name of the JSON.
    """
    times = []
    for inputs, outputs in shapes:
        timed = kernels(inputs, outputs)
        for count in rows:
            x = torch.randn(count, inputs)
            with torch.inference_mode():
                calls = {name: lambda one=one, x=x: one(x) for name, one in timed.items()}
                common.interleaved(calls, 2)
                found = common.interleaved(calls, rounds)
            times.append(
                {"inputs": inputs, "outputs": outputs, "rows": count}
                | {name: 1e3 * value for name, value in found.items()}
            )
    names = list(times[0])[3:]
    common.show(
        f"ms for the products of {_LAYERS} layers",
        ["inputs x outputs, rows", *names],
        [
            [f"{row['inputs']} x {row['outputs']}, {row['rows']}"]
            + [f"{row[name]:.2f}" for name in names]
            for row in times
        ],
    )
    folder = model / "model" if (model / "model").is_dir() else model
    loaded = ImageGPT.from_pretrained(folder).requires_grad_(False)
    split = TokenDataset(tokens)["test"]
    data = torch.from_numpy(split.rows(np.arange(max(images, completions))).astype(np.int64))
    kinds = ("fp32", *(["bf16"] if multiplies_bf16("cpu") else []), "int8")
    nats = {
        kind: sum(len(part) * losses(loaded, part, kind) for part in data[:images].split(32))
        / images
        for kind in kinds
    }
    n = loaded.config.n_pixels
    # One pixel per pass, so that only the precision differs.
    samples = {
        kind: complete(
            loaded, data[:completions], loaded.config.resolution // 2, precision=kind, window=1
        )
        for kind in kinds
    }
    differing = {}
    for kind, sampled in samples.items():
        wrong = (sampled != samples["fp32"])[:, n // 2 :]
        # Pixels after the first difference have other pixels before them.
        before = (wrong.cumsum(1) == 0).sum(1)
        differing[kind] = {
            "share_of_pixels": float(wrong.float().mean()),
            "share_given_equal_pixels_before": float(wrong.any(1).sum())
            / float(before.sum() + wrong.any(1).sum()),
        }
    common.show(
        f"{images} test images; {completions} lower halves with equal noise",
        ["precision", "nats/pixel", "differing pixels", "with equal pixels before"],
        [
            [
                kind,
                f"{nats[kind]:.4f}",
                f"{differing[kind]['share_of_pixels']:.1%}",
                f"{differing[kind]['share_given_equal_pixels_before']:.2%}",
            ]
            for kind in kinds
        ],
    )
    common.record(
        result,
        {
            "model": str(model),
            "shape": loaded.config.model_dump(),
            "images": images,
            "completions": completions,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "times": times,
            "nats_per_pixel": nats,
            "differing": differing,
        },
    )


if __name__ == "__main__":
    common.run(main)
