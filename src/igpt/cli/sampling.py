"""The commands that generate images: sample, complete, app."""

from functools import partial
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from igpt.api import load_model
from igpt.builtin_models import CARD, DEFAULT_MODEL, NAMES, find_builtin
from igpt.cli.parser import Options, argument
from igpt.errors import InputError
from igpt.model.locate import model_and_run
from igpt.outputs import require_writable
from igpt.progress import progress_bar

if TYPE_CHECKING:
    from igpt.sampling.jobs import SamplingSettings


class ColorOptions(Options):
    """The options of how colours are sampled."""

    temperature: float = Field(
        1.0,
        description="1 samples from the model's distribution, 0 selects the most likely colours",
    )
    top_k: int | None = Field(None, description="only the k most likely colours of every pixel")
    top_p: float | None = Field(
        None, description="only the most likely colours whose probabilities add up to this value"
    )


class _Sampling(ColorOptions):
    """The options of commands that show what they sample."""

    groups: ClassVar = {
        "images": ("tokens", "classes", "class_name", "count", "keep_rows", "mask", "completions"),
        "sampling": ("temperature", "top_k", "top_p", "guidance", "seed"),
        "hardware": ("precision", "window"),
    }

    guidance: float = Field(
        1.0,
        description="with --class: 1 samples from the distribution of the class, more moves away "
        "from that without a class",
    )
    seed: int = Field(0, description="the same seed gives the same images")
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto",
        description="precision of matrix products; auto selects bf16 if the processor supports it; "
        "int8 rounds weights and inputs to 8 bits: faster on CPUs with VNNI or AMX, less exact",
    )
    window: int | None = Field(
        None,
        description="pixels of each image computed in one pass; in fp32 the samples do not depend "
        "on it; chosen automatically by default",
    )

    def sampling_settings(self) -> "SamplingSettings":
        """Return the settings of the sampler.

        Raises:
            InputError: a setting is out of range.
        """
        from igpt.sampling.jobs import SamplingSettings, require_sampling_settings

        settings = SamplingSettings(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            precision=self.precision,
            window=self.window,
        )
        if self.guidance != 1:
            settings["guidance"] = self.guidance
        require_sampling_settings(**settings)
        return settings


class Sample(_Sampling):
    """Generate images."""

    settings = "igpt.sampling.grids"
    example = "igpt sample runs/photos --count 16"

    model: Path = argument(
        "run, model directory, name of a built-in model, or Hub id", default=Path(DEFAULT_MODEL)
    )
    out: Path | None = Field(
        None,
        description="PNG to write; by default samples.png in the run, or in the current folder for "
        "a model without a run",
    )
    count: int = Field(16, description="number of images, of each class if --class names any")
    classes: tuple[str, ...] = Field(
        (),
        description="names of classes to sample, with a model of igpt pretrain --condition labels",
        json_schema_extra={"flag": "--class"},
    )
    folder: Path | None = Field(
        None,
        description="folder to create, in which every image is a PNG of its own too, in the "
        "model's resolution; with --class, in folders named as the classes",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.sampling.grids import require_new_folder, require_target, save_samples

        path, home = model_and_run(self.model)
        target = self.out or home / "samples.png"
        settings = self.sampling_settings()
        require_target(target)
        require_writable(target)
        if self.folder:
            require_new_folder(self.folder, self.classes)
        loaded = load_model(path)
        with progress_bar() as show:
            save_samples(
                loaded,
                target,
                self.count,
                settings,
                partial(show, "sampling"),
                classes=self.classes,
                folder=self.folder,
            )
        each = "each of " if len(self.classes) > 1 else ""
        of = f" of {each}{', '.join(self.classes)}" if self.classes else ""
        print(f"{target}: {self.count} samples{of}")
        if self.folder:
            print(f"{self.folder}: the same images, one by one")


class Complete(_Sampling):
    """Keep the upper rows of images, or the pixels that a mask leaves, and generate the rest."""

    settings = "igpt.sampling.grids"
    example = "igpt complete runs/photos cat.jpg dog.jpg --keep-rows 16"

    model: Path = argument(
        "run, model directory, name of a built-in model, or Hub id; if the first argument is an "
        "image file or the only one is a folder of images, the built-in model is used",
        default=Path(DEFAULT_MODEL),
    )
    images: tuple[Path, ...] = argument("image files, or folders of images", default=())
    tokens: Path | None = Field(
        None,
        description="token data set: complete its test images, spread evenly, instead of files",
    )
    count: int = Field(
        8, description="number of test images of --tokens, or of images of folders, spread evenly"
    )
    keep_rows: int | None = Field(
        None, description="rows to keep, at the model's resolution; the upper half by default"
    )
    mask: Path | None = Field(
        None,
        description="image whose bright pixels are generated and whose dark or transparent ones "
        "are kept, instead of --keep-rows",
    )
    completions: int = Field(4, description="completions per image")
    class_name: str | None = Field(
        None,
        description="class of the images, with a model of igpt pretrain --condition labels",
        json_schema_extra={"flag": "--class"},
    )
    out: Path | None = Field(
        None,
        description="PNG to write; by default completions.png in the run, or in the current folder "
        "for a model without a run",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.data.tokens.dataset import TokenDataset
        from igpt.model.images import files_of, tokens_of_files, tokens_of_split
        from igpt.model.match import require_match
        from igpt.sampling.grids import require_target, save_completions
        from igpt.sampling.images import kept_pixels

        tokens, mask, keep_rows = self.tokens, self.mask, self.keep_rows
        model, paths = self._model_and_images()
        if bool(paths) == bool(tokens):
            raise InputError("give image files to complete, or --tokens with a token data set")
        if mask and keep_rows is not None:
            raise InputError("give --keep-rows or --mask, not both")
        path, home = model_and_run(model)
        target = self.out or home / "completions.png"
        settings = self.sampling_settings()
        require_target(target)
        require_writable(target)
        images, left_out = files_of(paths)
        if self.count < 1:
            raise InputError(f"--count is at least 1, not {self.count}")
        if len(images) > self.count and any(path.is_dir() for path in paths):
            print(f"{self.count} of {len(images)} images, spread evenly; --count sets the number")
            images = [images[index * len(images) // self.count] for index in range(self.count)]
        if target.resolve() in {file.resolve() for file in (*images, *([mask] if mask else []))}:
            raise InputError(f"{target} is one of the images to read; choose another -o")
        loaded = load_model(path)
        if tokens:
            data = TokenDataset(tokens)
            require_match(loaded, data, model)
            originals = tokens_of_split(data["test"], self.count)
        else:
            originals = tokens_of_files(loaded, images)
        keep = kept_pixels(loaded, keep_rows, mask)
        if isinstance(keep, int):
            kept = f"{keep} rows"
        elif left := int(keep.sum()):
            kept = f"{left} of {len(keep)} pixels, by {mask}"
        else:
            kept = f"nothing: {mask} hides the whole image"
        with progress_bar() as show:
            save_completions(
                loaded,
                originals,
                target,
                keep,
                self.completions,
                settings,
                partial(show, "completing"),
                class_name=self.class_name,
            )
        print(
            f"{target}: from left to right, each original, the given pixels ({kept}), "
            f"{self.completions} completions"
        )
        if left_out:
            print(f"left out: {left_out.text()}{left_out.advice()}")

    def _model_and_images(self) -> tuple[Path, tuple[Path, ...]]:
        """Return the model and the images; if the first argument is an image, the built-in model.

        It is an image if it is a file, or if there is no such model and its name is that of an
        image file. It is a folder of images if nothing else is to be completed, and it is neither
        a model nor a run.
        """
        first = self.model
        if first.is_dir():
            known = (model_and_run(first)[0] / "config.json", first / "config.yaml")
            is_alone = not self.images and self.tokens is None
            is_image = is_alone and not any(path.exists() for path in known)
        else:
            is_image = first.exists() or (guess_type(first.name)[0] or "").startswith("image/")
        if is_image and str(first) not in NAMES:
            return Path(DEFAULT_MODEL), (first, *self.images)
        return first, self.images


class App(Options):
    """Serve a web page that completes, scores and samples images."""

    settings = "igpt.webapp.server"
    example = "igpt app runs/photos"

    model: Path = argument(
        "run, model directory, name of a built-in model, or Hub id", default=Path(DEFAULT_MODEL)
    )
    host: str = Field("127.0.0.1", description="address to listen on; only this machine by default")
    port: int = Field(7860, description="port to listen on")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.webapp.server import serve

        path, home = model_and_run(self.model)
        run = home if path == home / "model" else None
        folder = run or path
        name = folder.resolve().name if folder.is_dir() else str(path)
        builtin = find_builtin(path)
        card = builtin / CARD if builtin else None
        serve(load_model(path), self.host, self.port, run, name, card)
