"""The commands that evaluate models: probe, quality, classify."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from igpt.api import load_model, probe, quality
from igpt.cli.data import print_left_out
from igpt.cli.parser import Options, argument
from igpt.cli.sampling import ColorOptions
from igpt.errors import InputError
from igpt.locks import exclusive
from igpt.model.locate import model_and_run
from igpt.outputs import require_writable


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


class Quality(ColorOptions):
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
    features: Path | None = Field(
        None, description="model whose features are compared; by default MODEL itself"
    )
    layer: int | None = Field(
        None, description="of the features; by default the best layer in the probe of that model"
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.data.left_out import left_out_of
        from igpt.environment import describe
        from igpt.evaluation.results import (
            QUALITY,
            QUALITY_VERSION,
            read_quality,
            require_same_images,
            source_path,
        )
        from igpt.files import write_json

        target = self.out or model_and_run(self.model)[1] / "quality.json"
        require_writable(target, QUALITY)
        own = (*self.groups["samples"], *self.groups["features"])
        with exclusive(target):
            if target.exists():
                require_same_images(target, read_quality(target), self.source)
            chosen: dict[str, Any] = {name: getattr(self, name) for name in own}
            result = quality(self.model, self.source, **chosen, **given)
            about = {
                "format": QUALITY,
                "version": QUALITY_VERSION,
                **result,
                "source_path": source_path(self.source),
                "environment": describe(),
            }
            write_json(target, about)
        prepared = result["left_out_of"] != "these images"
        what = f"left out when {self.source} was prepared" if prepared else "left out"
        left_out = left_out_of(result, str(target))
        print_left_out(left_out, result["warnings"], target, what=what)
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
