"""The commands on data: palette, prepare, inspect."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from igpt.api import prepare
from igpt.cli.parser import Options, argument
from igpt.cli.spread import SpreadOptions
from igpt.config import file_settings
from igpt.errors import InputError
from igpt.progress import progress_bar
from igpt.remote import shown, url_of

if TYPE_CHECKING:
    from igpt.data.left_out import LeftOut

_CLASSES_SHOWN = 20
_GROUPS = {
    "images": ("image_column", "label_column", "stream", "full_decode", "max_bad", "limit"),
    "splits": ("train_split", "validation_split", "test_split", "held_out", "seed"),
    "tokens": ("size", "colors", "transparent", "palette", "filter", "enlarge", "views"),
}


class PaletteOptions(Options):
    """Fit a palette to images, or compute the error of a given one on them."""

    settings = "igpt.data.palette_fit:PaletteConfig"
    example = "igpt palette photos/ --size 32 -o palette.npy"
    groups = _GROUPS

    source: str = argument("images: see igpt prepare")
    out: Path | None = Field(
        None,
        description="file to write (.npy, in OpenAI's format), palette.npy by default; its error "
        "is written to a .json file and example images to a .png file of the same name",
    )
    config: Path | None = Field(None, description="settings in YAML or JSON; flags override them")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.data.images.grid import save_png
        from igpt.data.left_out import BAD
        from igpt.data.palette_fit import (
            NONE_TRANSPARENT,
            PaletteConfig,
            given_palette,
            palette_notes,
            settle_palette,
        )
        from igpt.data.sources.catalogue import open_source
        from igpt.environment import describe
        from igpt.files import write_json

        source, out = self.source, self.out or Path("palette.npy")
        if out.suffix != ".npy":
            raise InputError(f"a palette is written to a .npy file, not to {out.name}")
        settings = PaletteConfig.layered(file_settings(self.config), given, where="the settings")
        opened = open_source(source, settings)
        train, left_out, allowance = (
            opened.splits["train"],
            opened.left_out,
            opened.allowance(settings.max_bad),
        )
        allowance.require(source, left_out)
        chosen = given_palette(source, train, settings)
        with progress_bar() as show:
            fitted = settle_palette(source, train, settings, chosen, show)
        result, quality, picture = fitted.palette, fitted.quality, fitted.picture
        if fitted.bad:
            allowance.require_decoded(fitted.bad, fitted.read)
            left_out.add(BAD, fitted.bad[0], count=len(fitted.bad), possible_images=True)
        warnings = palette_notes(chosen, train, settings)
        if result.transparent and quality and not quality["share"][-1]:
            warnings.append(NONE_TRANSPARENT)
        result.save(out)
        report = {
            "source": source,
            "config": settings.model_dump(mode="json"),
            "fingerprint": result.fingerprint,
            **quality,
            "left_out": left_out.to_json(),
            "warnings": warnings,
        }
        write_json(out.with_suffix(".json"), {**report, "command": describe()["command"]})
        if picture:
            save_png(picture, out.with_suffix(".png"))
        example = f"; {out.with_suffix('.png')} shows images in its colours" if picture else ""
        print(f"{out}: {len(result)} colours ({_fidelity(quality)}){example}")
        print_left_out(left_out, warnings, out.with_suffix(".json"))


def print_left_out(
    left_out: "LeftOut", warnings: Sequence[str], where: str | Path, *, what: str = "left out"
) -> None:
    """Print the files that were left out of a source in one line, and each warning in one line."""
    if left_out:
        print(f"{what}: {left_out.text()}{left_out.advice()}; {where} lists it")
    for warning in warnings:
        print(f"warning: {warning}")


def _fidelity(quality: Mapping[str, Any]) -> str:
    if not quality:
        return "tokens as they were given"
    if quality["psnr_db"] is None:
        return "exact"
    return f"mean squared error {quality['mse']:.1f} per channel, {quality['psnr_db']:.1f} dB PSNR"


class Prepare(SpreadOptions):
    """Convert images to a token data set: palette, tokens, splits."""

    settings = "igpt.data.prepare:PrepareConfig"
    example = "igpt prepare photos/ --size 32 -o tokens/photos"
    groups: ClassVar = {
        **_GROUPS,
        "several machines": ("engine", "address", "shard", "merge"),
    }
    out_is_folder = True
    out_may_be_url = True

    source: str = argument(
        "'digits' (bundled), a folder or file of images, Parquet, Arrow, WebDataset tars or ZIP "
        "archives, also behind a URL (s3://, gs://, hf://, https://), the original files of CIFAR, "
        "STL-10 or OpenAI, or a Hub id (id:config)",
        default="",
    )
    out: Path = Field(description="token data set to write: a folder, or the URL of one (s3://)")
    config: Path | None = Field(None, description="settings in YAML or JSON; flags override them")
    workers: int | None = Field(None, description="number of processes; all cores by default")

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.data.left_out import left_out_of
        from igpt.data.merge import merge as join
        from igpt.data.parts import part_number
        from igpt.data.prepare import (
            PLAN,
            RECORDS,
            PrepareConfig,
            prepare_part,
            warnings_of,
            with_records,
        )
        from igpt.files import read_json

        source, out, shard = self.source, self.out, self.shard
        cluster = self.cluster()
        if cluster and self.workers is not None:
            raise InputError(
                "--workers is the number of processes on this machine; leave it out with "
                "--engine ray"
            )
        if not source and not self.merge:
            raise InputError("name a SOURCE of images")
        if source and self.merge:
            raise InputError("--merge takes no SOURCE: it merges the parts of OUT")
        if shard:
            settings = PrepareConfig.layered(
                file_settings(self.config), given, where="the settings"
            )
            with progress_bar() as show:
                part = prepare_part(
                    source,
                    out,
                    settings,
                    part_number(shard),
                    workers=os.cpu_count() or 1 if self.workers is None else self.workers,
                    progress=partial(show, "tokenising"),
                    phase=show,
                )
            print(
                f"{part}: part {shard}; when all parts are there, merge them: igpt prepare "
                f"--merge -o {out}"
            )
            plan = read_json(part / PLAN, "part of a token data set")
            records = list(
                read_json(part / RECORDS, "part of a token data set")["records"].values()
            )
            print_left_out(with_records(plan, records), warnings_of(plan, records), part)
            return
        if self.merge:
            PrepareConfig.layered(file_settings(self.config), given, where="the settings")
            result = join(out)
        else:
            result = prepare(
                source, out, config=self.config, workers=self.workers, cluster=cluster, **given
            )
        made = result.manifest["made"]
        counts = ", ".join(f"{len(result[split])} {split}" for split in result)
        classes = f"{len(result.class_names)} classes" if result.class_names else "no labels"
        kind = f"{result.resolution} px, {classes}, {len(result.palette)} colours"
        print(f"{shown(out)}: {counts}; {kind} ({_fidelity(made['palette_error'])})")
        manifest = f"{shown(out)}/dataset.json"
        print_left_out(left_out_of(made, manifest), made.get("warnings", []), manifest)


class Inspect(Options):
    """Verify a token data set, show its contents, and write a sheet of example images."""

    settings = "igpt.data.tokens.inspect"
    example = "igpt inspect tokens/photos"

    tokens: Path = argument("token data set")
    out: Path | None = Field(
        None,
        description="PNG to write, with all numbers in a .json file of the same name; TOKENS.png "
        "by default (of a URL, in the current folder)",
    )

    def execute(self, given: dict[str, Any]) -> None:
        """Run the command."""
        from igpt.data.images.grid import require_png, save_png
        from igpt.data.tokens.dataset import TokenDataset
        from igpt.data.tokens.inspect import inspect as run
        from igpt.data.tokens.inspect import sheet
        from igpt.files import resolved, write_json

        url, folder = url_of(self.tokens), resolved(self.tokens)
        beside = Path(f"{folder.name}.png") if url else folder.with_name(f"{folder.name}.png")
        if not self.tokens.is_absolute():
            beside = Path(os.path.relpath(beside))
        target = self.out or beside
        require_png(target)
        data = TokenDataset(self.tokens)
        with progress_bar() as show:
            # The data set of a URL is read from its copy.
            found = run(data, partial(show, "reading")) | {"path": shown(self.tokens)}
        save_png(sheet(data), target)
        write_json(target.with_suffix(".json"), found)
        for line in _description(found):
            print(line)
        print(f"{target}: a sheet of training images; {target.with_suffix('.json')}: all numbers")


def _description(found: Mapping[str, Any]) -> Iterator[str]:
    from igpt.data.left_out import LeftOut
    from igpt.data.prepare import PrepareConfig

    made, splits = found["made"], found["splits"]
    yield (
        f"{found['path']}: {found['resolution']} px, {found['colors']} colours "
        f"(palette fingerprint {found['fingerprint'][:12]}), {found['bytes'] / 1e6:.1f} MB in "
        f"{found['shards']} shards, all intact"
    )
    usual = PrepareConfig().model_dump(mode="json")
    settings = [
        f"{key} {value}" for key, value in made["config"].items() if value != usual.get(key)
    ]
    yield f"source: {found['source']}{'; settings: ' if settings else ''}{', '.join(settings)}"
    yield f"palette: {_fidelity(made['palette_error'])}; {_usage(found['color_share'])}"
    for name, split in splits.items():
        unlabelled = (
            f", {split['unlabelled']} without a label"
            if 0 < split["unlabelled"] < split["images"]
            else ""
        )
        labels = unlabelled or ("" if split["per_class"] else ", no labels")
        yield f"{name}: {split['images']} images{labels}"
    classes = list(splits["train"]["per_class"])
    if classes:
        yield f"images of each of the {len(classes)} classes ({', '.join(splits)}):"
        for label in classes[:_CLASSES_SHOWN]:
            counts = [str(split["per_class"][label]) for split in splits.values()]
            yield f"  {label}: {', '.join(counts)}"
        if len(classes) > _CLASSES_SHOWN:
            images = list(splits["train"]["per_class"].values())
            more = len(classes) - _CLASSES_SHOWN
            spread = f"{min(images)} to {max(images)}"
            yield f"  ... and {more} more; training images per class: {spread}"
    left_out = LeftOut.from_json(found["left_out"], found["path"])
    if left_out:
        yield f"left out: {left_out.text()}"
    for warning in made.get("warnings", []):
        yield f"warning: {warning}"


def _usage(share: list[float]) -> str:
    used = sum(value > 0 for value in share)
    most = f"the most frequent in {max(share):.1%} of the pixels"
    return f"{used} of {len(share)} colours occur in training, {most}"
