"""Train one recipe on one thread, and write its validation losses.

    python experiments/speedrun/train.py TOKENS RECIPE.json RESULT.json [--give-up CURVES.json]

`run.py` starts it. The result is written after every validation and marked as finished at the end.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt.allocator import keep_freed_memory
from igpt.data.tokens.batches import augment, batch_rows
from igpt.data.tokens.dataset import TokenDataset
from igpt.environment import describe
from igpt.files import write_json
from igpt.model.precision import autocast, resolve_precision

sys.path.insert(0, str(Path(__file__).parent))
from recipe import RaceModel, Recipe, optimizers_of

_CPU = torch.device("cpu")


def train(tokens: Path, recipe: Recipe, out: Path, limits: dict[int, float]) -> dict[str, Any]:
    """Train a recipe and return its result, which is also written to `out`.

    Args:
        limits: losses by images seen; training stops after a validation above its limit.
    """
    written = recipe.model_dump(mode="json", exclude_defaults=True)
    recipe = recipe.model_copy(update={"precision": resolve_precision(recipe.precision, _CPU)})
    data = TokenDataset(tokens)
    split, validation = data["train"], data["validation"]
    rows = split.rows(np.arange(len(split)))
    checked = validation.rows(
        np.arange(recipe.validation_images) * len(validation) // recipe.validation_images
    )
    parts = torch.from_numpy(checked.astype(np.int64)).split(64)
    torch.manual_seed(recipe.seed)
    model = RaceModel(recipe, data.palette, data.resolution)
    objective, parameters = model.config.trained_as, list(model.parameters())
    optimizers = optimizers_of(model)
    curve: list[dict[str, float]] = []
    result = {
        "recipe": written,
        "precision": recipe.precision,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tokens": data.palette.fingerprint,
        "environment": describe(),
        "finished": False,
        "curve": curve,
    }
    seen, steps, seconds, due = 0, 0, 0.0, recipe.validate_every
    while seen < recipe.images:
        begun = time.process_time()
        size = recipe.batch_at(seen)
        # A step takes the next images of the same stream, whatever the batches before it.
        at = [int(batch_rows(recipe.seed, seen + one, 1, len(rows))[0]) for one in range(size)]
        batch = rows[at]
        if recipe.flip:
            generator = np.random.default_rng((recipe.seed, steps, 1))
            batch = augment(batch, data.resolution, generator, flip=True, shift=0)
        with autocast(recipe.precision, _CPU):
            summed, count = objective.loss(model, torch.from_numpy(batch.astype(np.int64)))
        (summed / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = recipe.rate_at(seen, size)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        seen, steps = seen + size, steps + 1
        seconds += time.process_time() - begun
        if seen < due and seen < recipe.images:
            continue
        due += recipe.validate_every
        with torch.no_grad(), autocast(recipe.precision, _CPU):
            loss = sum(float(objective.loss(model, part)[0]) for part in parts) / len(checked)
        curve.append({"images": seen, "steps": steps, "loss": loss, "seconds": seconds})
        behind = not loss <= limits.get(seen, torch.inf)
        result |= {"finished": behind or seen >= recipe.images, "behind": behind}
        write_json(out, result)
        if behind:
            break
    return result


if __name__ == "__main__":
    tokens, recipe, out, *limits = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()
    read = json.loads(limits[0]) if limits else {}
    train(
        Path(tokens),
        Recipe.layered(json.loads(Path(recipe).read_text()), where=recipe),
        Path(out),
        {int(images): loss for images, loss in read.items()},
    )
