"""Generation speed of iGPT-S at 32 px, next to transformers' `generate` and a full pass per pixel.

    python benchmarks/generate.py                      # CPU: batches 1 and 16, all 1,024 tokens
    python benchmarks/generate.py --batches 1 64 256   # GPU

Weights are random, which changes no speed. Contenders take turns. The bound is the bytes that a
step must read (weights and the cache so far) over the rate at which this machine reads memory,
measured here. A full pass costs the same at every pixel (the released code runs all n of them), so
that only a few are timed. transformers' cost per token is the mean over all its tokens, or with
--most over the first tokens of both.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from igpt.model.config import ModelConfig
from igpt.model.cost import cache_bytes, count_parameters
from igpt.model.precision import resolve_precision
from igpt.model.transformer import ImageGPT
from igpt.sampling.sampler import complete
from igpt.training.presets import preset


def read_rate(device: torch.device) -> float:
    """Return the bytes/s at which memory is read: the best of ten sums over 1 GiB."""
    block = torch.ones(2**28, device=device)
    seconds = []
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        block.sum()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return block.numel() * 4 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_bytes(config: ModelConfig, batch: int, tokens: int, number: int) -> float:
    """Return the mean bytes that a step reads: weights without embeddings, and half the cache."""
    read = count_parameters(config) - (config.n_colors + 1 + config.n_pixels) * config.n_embd
    return number * read + batch * cache_bytes(config, number) * tokens / config.n_pixels / 2


def main(
    model: str = "igpt-s",
    batches: tuple[int, ...] = (1, 16),
    rounds: int = 3,
    most: int | None = None,
    result: str = "generate",
) -> None:
    """Measure tokens/s.

    Args:
        model: preset.
        batches: images at a time.
        rounds: number of turns; results are medians.
        most: generate only this many tokens.
        result: name of the JSON.
    """
    settings = {
        key: value for key, value in preset(model).items() if key in ModelConfig.model_fields
    }
    config = ModelConfig.layered(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours = ImageGPT(config)
    torch.nn.init.normal_(ours.lm_head.weight, std=0.2)
    ours = ours.to(device).eval()
    theirs = {}
    shape = {"n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        hub = ImageGPTConfig(vocab_size=config.n_colors + 1, n_positions=config.n_pixels, **shape)
        theirs[name] = ImageGPTForCausalImageModeling(hub).to(device, kind).eval()
    rate = read_rate(device)
    precision = resolve_precision("auto", device)
    # Emulated bf16 would take an hour here: it is timed on a few tokens.
    tokens = min(most or config.n_pixels, config.n_pixels)
    # Their model has no position for the last pixel, because the start token takes one.
    theirs_tokens = min(tokens, config.n_pixels - 1)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        start = torch.full((batch, 1), config.n_colors, device=device)
        empty = torch.zeros(batch, config.n_pixels, dtype=torch.long, device=device)

        def ours_generates(kind: str, many: int = tokens, images: torch.Tensor = empty) -> None:
            positions = torch.arange(config.n_pixels, device=device)
            complete(ours, images, positions >= many, precision=kind)

        def generate(kind: str, many: int = theirs_tokens, first: torch.Tensor = start) -> None:
            length = {"max_new_tokens": many, "min_new_tokens": many}
            theirs[kind].generate(
                first, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None, **length
            )

        @torch.inference_mode()
        def full(images: torch.Tensor = empty) -> None:
            theirs["fp32"](images, use_cache=False)

        def timed(call: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                call()
                _wait(device)

            return run

        contenders = {"ours fp32": timed(lambda: ours_generates("fp32"))}
        if precision == "bf16":
            contenders["ours bf16"] = timed(lambda: ours_generates("bf16"))
            contenders["transformers bf16"] = timed(lambda: generate("bf16"))
        contenders["transformers fp32"] = timed(lambda: generate("fp32"))
        contenders["full pass"] = timed(full)
        ours_generates(precision, 8)
        seconds = common.interleaved(contenders, rounds)
        if precision == "fp32":
            seconds["transformers bf16"] = common.interleaved(
                {"": timed(lambda: generate("bf16", 16))}, 1
            )[""]
        partly_timed = {
            "full pass": 1,
            "transformers bf16": theirs_tokens if precision == "bf16" else 16,
        }
        best = f"ours {precision}"
        speeds = {}
        timed_tokens = {
            name: partly_timed.get(name, tokens if name.startswith("ours") else theirs_tokens)
            for name in seconds
        }
        for name, value in seconds.items():
            speeds[name] = batch * timed_tokens[name] / value
        rival = max(value for name, value in speeds.items() if name.startswith("transformers"))
        number = 2 if precision == "bf16" else 4
        bound = batch * rate / step_bytes(config, batch, tokens, number)
        for name, speed in speeds.items():
            share = bound if name == best else None
            rows.append(
                {
                    "batch": batch,
                    "contender": name,
                    "tokens_per_second": speed,
                    "tokens_timed": timed_tokens[name],
                    "seconds": seconds[name],
                    "best_over_this": speeds[best] / speed,
                    "share_of_bound": speed / share if share else None,
                }
            )
        print(
            f"batch {batch}: {speeds[best] / rival:.2f} times the better of transformers",
            flush=True,
        )
    common.show(
        f"{model} at {config.resolution} px, {tokens} tokens, tokens/s; "
        f"memory is read at {rate / 1e9:.1f} GB/s",
        ["batch, contender", "tokens/s", "ours / this", "of the bound"],
        [
            [
                f"{row['batch']}, {row['contender']}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['best_over_this']:.2f}",
                f"{row['share_of_bound']:.0%}" if row["share_of_bound"] else "",
            ]
            for row in rows
        ],
    )
    settings_used = {
        "model": model,
        "tokens": tokens,
        "rounds": rounds,
        "bytes_per_second": rate,
        "threads": os.cpu_count(),
    }
    common.record(result, {**settings_used, "precision": precision, "rows": rows})


if __name__ == "__main__":
    common.run(main)
