"""Compare training tokens/s of igpt, transformers' ImageGPT, a plain loop, and matrix products.

Contenders start from the same weights and train on the same random tokens with the same AdamW; they
alternate, round by round, in one process. Each round also measures the fastest matrix products with
the model's own shapes, the "ceiling"; a model's share of it is its FLOP/s (products only; causal
attention counts half) divided by the ceiling. The dropout of transformers is 0, and its input is
[sos, x1 .. x(n-1)], so that all models are trained on all n positions. Rates are per token, because
slow contenders get smaller batches (equal within a precision) and may have fewer rounds; the JSON
contains both. On a GPU, contenders are created again for every round, so that each has all the
memory.

    python benchmarks/train.py
    python benchmarks/train.py --shapes igpt-l --contenders igpt-bf16-compiled \\
        plain-bf16-compiled --result train-l
"""

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from common import record, run, show
from train_contenders import ENTRIES, Job, Precision, activation_bytes
from train_turns import TYPES, Bench, Contender, Settings, peak_growth, set_allocator

from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters, training_flops
from igpt.training.distributed import distributed_world


@dataclass(frozen=True)
class Shape:
    config: ModelConfig
    cpu_batch: int
    gpu_batch: int
    weight: float = 3.0  # of its share of the time


SHAPES = {
    "small": Shape(
        ModelConfig(resolution=8, n_colors=17, n_layer=6, n_embd=192, n_head=6), 256, 4096, 1.0
    ),
    "igpt-s": Shape(ModelConfig(n_layer=24, n_embd=512, n_head=8), 4, 128),
    "igpt-l": Shape(ModelConfig(n_layer=48, n_embd=1536, n_head=16), 1, 128),
}
EXPECTED_SHARE = 0.25  # of the ceiling, from which batch sizes are chosen


def compare(
    bench: Bench, shape: Shape, names: Sequence[str], settings: Settings, seconds: float
) -> dict[str, Any]:
    """Run all rounds of one shape, for roughly the given seconds per contender."""
    start = time.monotonic()
    config, largest = (
        shape.config,
        settings.batch_size or (shape.gpu_batch if bench.gpu else shape.cpu_batch),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.n_colors, (largest, config.n_pixels), generator=generator).to(
        bench.world.device
    )
    rows = {name: bench.ceiling_rows(config, tokens.numel(), name) for name in TYPES}
    ceilings = {name: [bench.ceiling(config, rows[name], name)] for name in TYPES}
    states = 16.0 * count_parameters(config)  # fp32 weights, gradients, AdamW's two moments
    keep = not bench.gpu and states * len(names) < 0.5 * bench.free_bytes()
    room = bench.free_bytes() * (0.8 if bench.gpu else 0.6) - states * (len(names) if keep else 1)
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home) / "model"
        references = bench.references(config, directory, tokens)
        contenders = []
        for name in names:
            entry = ENTRIES[name]
            batch = largest
            expected = training_flops(config) / (EXPECTED_SHARE * ceilings[entry.precision][0])
            while batch > 1 and batch * expected > seconds / 5 and not settings.batch_size:
                batch //= 2
            micro = settings.micro_batch_size or max(1, int(room / activation_bytes(config, entry)))
            if not settings.micro_batch_size and micro < batch:
                micro = 1 << (micro.bit_length() - 1)  # so that micro-batches have equal sizes
            job = Job(
                directory,
                config,
                entry.precision,
                batch,
                min(batch, micro),
                settings.activation_checkpointing,
            )
            contenders.append(Contender(name, job))
        allowed = 0.0
        for number in range(settings.rounds):
            if number == 1:
                allowed = (
                    (seconds * len(names) - (time.monotonic() - start))
                    / len(names)
                    / (settings.rounds - 1)
                )
            taking_part = [one for one in contenders if number == 0 or one.due(number * allowed)]
            for name, values in ceilings.items():
                if number:
                    values.append(
                        bench.ceiling(config, rows[name], name) if taking_part else values[-1]
                    )
            for one in taking_part:
                reference = sum(references[: one.job.batch_size]) / one.job.batch_size
                bench.turn(one, number, tokens, reference, seconds, keep)
        bench.release(contenders)
        if settings.memory and not bench.gpu:
            for one in contenders:
                if not one.skipped:
                    one.found["peak_bytes"] = peak_growth(one.name, one.job, settings)
    return {
        "ceiling_tokens": rows,
        "kept_between_turns": keep,
        **summary(shape, contenders, ceilings),
    }


def summary(
    shape: Shape, contenders: Sequence[Contender], ceilings: dict[Precision, list[float]]
) -> dict[str, Any]:
    """Return the record of a shape; the fastest of igpt's contenders is "ours"."""
    per_token = training_flops(shape.config) / shape.config.n_pixels
    timed = [one for one in contenders if one.rates]
    ours = max(
        (one for one in timed if one.name.startswith("igpt")),
        key=lambda one: _median(one.rates),
        default=None,
    )
    rows = {}
    for one in contenders:
        entry, row = (
            ENTRIES[one.name],
            {**one.found, "precision": ENTRIES[one.name].precision, "skipped": one.skipped},
        )
        row |= {"batch_size": one.job.batch_size, "micro_batch_size": one.job.micro_batch_size}
        if one.rates:
            shares = {
                name: median(
                    rate * per_token / ceilings[name][number] for number, rate in one.rates.items()
                )
                for name in TYPES
            }
            row |= {
                "n": len(one.rates),
                "updates_a_turn": one.updates,
                "first_update_was_timed": one.first_counts,
                "tokens_per_second": _median(one.rates),
                "slowest_and_fastest": [min(one.rates.values()), max(one.rates.values())],
                "by_round": one.rates,
                "model_flops_per_second": _median(one.rates) * per_token,
                "of_own_ceiling": shares[entry.precision],
                "of_bf16_ceiling": shares["bf16"],
            }
            if ours:
                both = ours.rates.keys() & one.rates.keys()
                row["ours_over_it"] = median(
                    ours.rates[number] / one.rates[number] for number in both
                )
        rows[one.name] = row
    return {
        "model": shape.config.model_dump(),
        "parameters": count_parameters(shape.config),
        "training_flops_of_an_image": training_flops(shape.config),
        "ceilings_flops_per_second": {
            name: {"median": median(all_), "by_round": all_} for name, all_ in ceilings.items()
        },
        "ours": ours.name if ours else None,
        "contenders": rows,
    }


def _median(rates: dict[int, float]) -> float:
    return median(rates.values())


def table(name: str, result: dict[str, Any]) -> None:
    rows = []
    for contender, row in result["contenders"].items():
        if row["skipped"]:
            print(f"{contender} was left out: {row['skipped']}")
        if "n" not in row:
            continue
        low, high = row["slowest_and_fastest"]
        peak = row.get("peak_bytes")
        rows.append(
            [
                contender,
                f"{row['batch_size']}/{row['micro_batch_size']}",
                row["n"],
                f"{row['tokens_per_second']:,.0f}",
                f"{low:,.0f}-{high:,.0f}",
                f"{row['ours_over_it']:.2f}" if "ours_over_it" in row else "",
                f"{row['model_flops_per_second'] / 1e12:.3f}",
                f"{row['of_own_ceiling']:.1%}",
                f"{row['of_bf16_ceiling']:.1%}",
                f"{row['loss_off']:+.0e}",
                f"{peak / 2**30:.2f}" if peak else "",
            ]
        )
    found = {key: one["median"] / 1e12 for key, one in result["ceilings_flops_per_second"].items()}
    title = (
        f"{name}, training. Ceilings: fp32 {found['fp32']:.3f}, bf16 {found['bf16']:.3f} TFLOP/s"
    )
    head = [
        "",
        "batch/micro",
        "n",
        "tokens/s",
        "range",
        "ours x",
        "TFLOP/s",
        "of own",
        "of bf16",
        "loss off",
        "GiB",
    ]
    show(title, head, rows)


def choose(settings: Settings, bench: Bench) -> tuple[list[str], list[str]]:
    """Return the shapes and the contenders.

    Raises:
        InputError: one is not known.
    """
    shapes = list(settings.shapes) or (["igpt-s", "igpt-l"] if bench.gpu else ["small", "igpt-s"])
    names = list(settings.contenders)
    for given, known in ((shapes, SHAPES), (names, {**ENTRIES, "all": None})):
        for name in given:
            if name not in known:
                raise InputError(f"{name!r} is none of {', '.join(known)}")
    if names and "all" not in names:
        return shapes, names
    left_out = set()
    if not names:
        # On a GPU nobody uses our eager fp32; a compiled plain loop is nanoGPT's
        # on a GPU.
        left_out = {"plain-fp32-compiled", "igpt-fp32" if bench.gpu else "plain-bf16-compiled"}
        ceilings = {name: bench.ceiling(SHAPES["small"].config, 512, name) for name in TYPES}
        if ceilings["bf16"] < ceilings["fp32"]:  # emulated
            left_out.add("igpt-bf16-compiled")
    return shapes, [name for name in ENTRIES if name not in left_out]


def transformers_version() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


def main(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Compare training speeds, print tables and write JSON."""
    set_allocator(settings)
    start = time.monotonic()
    with distributed_world(settings.device) as world:
        bench = Bench(world)
        shapes, names = choose(settings, bench)
        left = 60 * (settings.minutes or (9 if bench.gpu else 13))
        gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if bench.gpu else None
        results: dict[str, Any] = {}
        for number, name in enumerate(shapes):
            shape = SHAPES[name]
            if settings.layers:
                shape = replace(
                    shape, config=shape.config.model_copy(update={"n_layer": settings.layers})
                )
            weights = [SHAPES[later].weight for later in shapes[number:]]
            seconds = (left - (time.monotonic() - start)) * weights[0] / sum(weights) / len(names)
            results[name] = compare(bench, shape, names, settings, max(1.0, seconds))
            table(name, results[name])
            about = {
                "settings": asdict(settings),
                "threads": torch.get_num_threads(),
                "transformers": transformers_version(),
            }
            about["float32_matmul_precision"] = torch.get_float32_matmul_precision()
            record(
                settings.result or (f"train-{gpu}" if gpu else "train"), about | {"shapes": results}
            )


if __name__ == "__main__":
    run(main)
