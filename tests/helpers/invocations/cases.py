"""The wrong invocations: generated from the commands, their flags, and the kinds of files they
read."""

import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from igpt.cli.parser import Options, flags_of, settings_class

from ...helpers.invocations.damage import DIGITS, damaged
from ...helpers.invocations.execution import Arrange, Case

# Valid words of every command, from which the wrong ones are made: positional words first.
VALID: Mapping[str, str] = {
    "demo": "--data images -o demo --steps 2",
    "reproduce": "--rehearsal --tokens-only --corpus images --labelled images -o reproduction",
    "palette": "images -o new.npy --size 8 --colors 4",
    "prepare": "images -o new --size 8 --colors 4 --workers 1",
    "inspect": "tokens -o new.png",
    "models": "-o new.json",
    "plan": "tiny -o new.json",
    "pretrain": "tokens -o new --config pretrain.yaml",
    "finetune": "run tokens -o new --config finetune.yaml",
    "classify": "classifier picture.png -o new.json",
    "probe": "run tokens -o new.json --config probe.yaml",
    "score": "run tokens -o new.csv --limit 10",
    "features": "run tokens -o new.npz --layer 1",
    "quality": "run tokens -o new.json --layer 1 --samples 0 --completions 2",
    "sample": "run -o new.png --count 1",
    "complete": "run picture.png -o new.png --completions 1",
    "report": "run",
    "card": "run user/name",
    "push": "run user/name",
    "import": "openai/model.ckpt-7 -o new",
    "export": "run --onnx new",
    "app": "classifier --host 300.1.1.1",  # it would serve for ever: there is no such host
}
_PREPARE = "-o new --size 8 --colors 4 --workers 1"
# Files that a command reads. The first command that reads a file is tried with more damage than the
# others.
READS: Mapping[str, tuple[str, ...]] = {
    "inspect tokens -o new.png": (
        "tokens/dataset.json",
        "tokens/train-00000.tokens.npy",
        "tokens/train-00000.labels.npy",
    ),
    "pretrain tokens -o new --config pretrain.yaml": (
        "pretrain.yaml",
        "tokens/dataset.json",
        "tokens/train-00000.tokens.npy",
    ),
    "finetune run tokens -o new --config finetune.yaml": (
        "finetune.yaml",
        "tokens/dataset.json",
        "tokens/train-00000.labels.npy",
    ),
    "score run tokens -o new.csv": ("tokens/test-00000.tokens.npy", "tokens/dataset.json"),
    "probe run tokens -o new.json --config probe.yaml": ("probe.yaml", "tokens/dataset.json"),
    "complete run --tokens tokens -o new.png --count 2": ("tokens/dataset.json",),
    "palette images -o new.npy --size 8 --palette tokens": ("tokens/dataset.json",),
    "prepare images -o begun --size 8 --colors 4 --workers 1": (
        "begun.partial/plan.json",
        "begun.partial/0-00000.done.json",
        "begun.partial/train-00000.tokens.npy",
    ),
    "prepare --merge -o cut": (
        "cut.1-of-2/plan.json",
        "cut.1-of-2/records.json",
        "cut.2-of-2/plan.json",
    ),
    "sample model -o new.png --count 1": (
        "model/config.json",
        "model/model.safetensors",
        "model/preprocessor_config.json",
    ),
    "score model images -o new.csv": ("model/preprocessor_config.json", "model/model.safetensors"),
    "probe model tokens -o new.json --config probe.yaml": ("model/config.json",),
    "finetune model tokens -o new --config finetune.yaml": ("model/model.safetensors",),
    "sample parts-model -o new.png --count 1": (
        "parts-model/model.safetensors.index.json",
        "parts-model/model-00001-of-00002.safetensors",
    ),
    "classify classifier picture.png": (
        "classifier/model/config.json",
        "classifier/model/model.safetensors",
        "picture.png",
    ),
    "pretrain tokens -o stopped --resume": (
        "stopped/config.yaml",
        "stopped/environment.json",
        "stopped/metrics.jsonl",
        "stopped/checkpoints/step-00000002/state.json",
        "stopped/checkpoints/step-00000002/.metadata",
        "stopped/checkpoints/step-00000002/__0_0.distcp",
    ),
    "finetune run tokens -o stopped-classifier --resume": (
        "stopped-classifier/config.yaml",
        "stopped-classifier/environment.json",
        "stopped-classifier/metrics.jsonl",
        "stopped-classifier/checkpoints/step-00000002/state.json",
    ),
    "finetune run tokens -o rates --resume": (
        "rates/config.yaml",
        "rates/rates/0.001/metrics.jsonl",
        "rates/rates/0.001/config.yaml",
        "rates/rates/0.002/metrics.jsonl",
    ),
    "report run": (
        "run/config.yaml",
        "run/environment.json",
        "run/metrics.jsonl",
        "run/probe.json",
        "run/score-tokens.json",
        "run/samples.json",
        "run/samples.png",
        "run/model/config.json",
    ),
    "report classifier": ("classifier/test.json", "classifier/metrics.jsonl"),
    "card run user/name": (
        "run/config.yaml",
        "run/environment.json",
        "run/metrics.jsonl",
        "run/probe.json",
    ),
    "card classifier user/name": ("classifier/test.json",),
    "push run user/name": ("run/README.md",),
    "features run tokens -o new.npz": ("run/probe.json",),
    "score run tokens --limit 3": ("run/score-tokens.json",),
    "app run --host 300.1.1.1": ("run/probe.safetensors", "run/metrics.jsonl", "run/probe.json"),
    "probe run tokens -o new.json --limit 60 --strengths 1 --no-baselines --features features": (
        "features/model/test/features.json",
        "features/model/test/layer-000.npy",
    ),
    f"reproduce {VALID['reproduce']}": (
        "reproduction/steps.json",
        "reproduction/evidence.json",
        "reproduction/tokens/labelled-4/dataset.json",
    ),
    f"demo {VALID['demo']}": (
        "demo/config.yaml",
        "demo/metrics.jsonl",
        "demo/probe.json",
        "demo/tokens/dataset.json",
    ),
    "palette images -o new.npy --size 8 --palette palette.npy": ("palette.npy",),
    "prepare images -o new --size 8 --palette palette.npy --workers 1": ("palette.npy",),
    "import openai/model.ckpt-7 -o new --clusters palette.npy": (
        "palette.npy",
        "openai/model.ckpt-7.index",
        "openai/model.ckpt-7.data-00000-of-00002",
    ),
    "palette images -o new.npy --size 8 --palette clusters.json": ("clusters.json",),
    "palette images -o new.npy --config palette.yaml": ("palette.yaml",),
    "palette images -o new.npy --config palette.json": ("palette.json",),
    "prepare images -o new --config prepare.yaml --workers 1": ("prepare.yaml",),
    "prepare images -o new --config prepare.json --workers 1": ("prepare.json",),
    "pretrain tokens -o new --config pretrain.json": ("pretrain.json",),
    "finetune run tokens -o new --config finetune.json": ("finetune.json",),
    "probe run tokens -o new.json --config probe.json": ("probe.json",),
    f"prepare images.parquet {_PREPARE}": ("images.parquet",),
    "score model images.parquet -o new.csv": ("images.parquet",),
    f"prepare plain.parquet {_PREPARE}": ("plain.parquet",),
    f"prepare images.tar {_PREPARE}": ("images.tar",),
    f"prepare images.tar.gz {_PREPARE}": ("images.tar.gz",),
    f"prepare cifar.tar.gz {_PREPARE}": ("cifar.tar.gz",),
    f"prepare cifar-10-batches-py {_PREPARE}": (
        "cifar-10-batches-py/data_batch_1",
        "cifar-10-batches-py/batches.meta",
    ),
    f"prepare stl10_binary {_PREPARE}": (
        "stl10_binary/train_X.bin",
        "stl10_binary/train_y.bin",
        "stl10_binary/class_names.txt",
    ),
    "prepare arrays/x -o new --size 8 --workers 1": (
        "arrays/x_trX.npy",
        "arrays/x_trY.npy",
        "arrays/kmeans_centers.npy",
    ),
    "score run arrays/x --published -o new.json": ("arrays/x_teX.npy",),
    f"prepare saved {_PREPARE}": (
        "saved/dataset_dict.json",
        "saved/train/state.json",
        "saved/train/dataset_info.json",
        "saved/train/data-00000-of-00001.arrow",
    ),
    f"prepare metadata {_PREPARE}": ("metadata/metadata.csv",),
    f"prepare images {_PREPARE}": ("images/train/a/0.png",),
    "complete run picture.png -o new.png --completions 1": ("picture.png",),
    "complete run picture.png --mask mask.png -o new.png --completions 1": ("mask.png",),
}
_SOURCES = {
    "source",
    "against",
    "palette",
    "corpus",
    "labelled",
    "data",
    "tokens",
}  # strings that may be paths
_LONG_WORK = {
    "demo": "demo",
    "reproduce": "reproduction",
}  # and their samples, which take long to make
# A run with the default number of steps, and the whole demonstration.
VALID_AND_LONG = (
    "pretrain.yaml: steps removed",
    "pretrain.json: steps removed",
    "demo: no words at all",
)
_REFUSED_AT_ONCE = ("unknown flag", "misspelt flag", "missing value", "wrong type")


@dataclass(frozen=True)
class Parameter:
    """A flag or positional word of a command.

    Attributes:
        name: as Python has it.
        kind: bool, int, float, str, Path or Literal; of a tuple, that of its items.
        choices: of a Literal.
        several: whether it is a tuple.
        positional: whether it is no flag.
        low, high: bounds, with whether the bound itself is allowed.
    """

    name: str
    kind: Any
    choices: tuple[Any, ...] = ()
    several: bool = False
    positional: bool = False
    low: tuple[float, bool] | None = None
    high: tuple[float, bool] | None = None

    @property
    def flag(self) -> str:
        """Return the flag as written on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_path(self) -> bool:
        """Return whether a file or folder can be given."""
        return self.kind is Path or self.name in _SOURCES

    @property
    def is_output(self) -> bool:
        """Return whether it names an output."""
        return self.name in ("out", "maps", "onnx") or (
            self.name == "features" and self.kind is Path
        )


def parameters(options: type[Options]) -> list[Parameter]:
    """Return all parameters of a command: the fields of its options, and those of its settings."""
    positional = {flag.name for flag in flags_of(options) if not flag.names}
    settings = settings_class(options)
    fields = {**(settings.model_fields if settings else {}), **options.model_fields}
    own = [*options.model_fields]
    return [
        _parameter(name, fields[name].annotation, fields[name].metadata, name in positional)
        for name in [*own, *(key for key in fields if key not in own)]
    ]


def _markers(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _parameter(name: str, annotation: Any, metadata: Iterable[Any], positional: bool) -> Parameter:
    bounds = list(metadata)
    several = False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            for marker in _markers(annotation):
                bounds += marker.metadata if isinstance(marker, FieldInfo) else [marker]
            annotation = get_args(annotation)[0]
        elif origin in (Union, UnionType):
            annotation = next(one for one in get_args(annotation) if one is not NoneType)
        elif origin is tuple:
            annotation, several = get_args(annotation)[0], True
        else:
            break
    choices = get_args(annotation) if origin is Literal else ()
    low = high = None
    for bound in bounds:
        for attribute, allowed in (("ge", True), ("gt", False)):
            if getattr(bound, attribute, None) is not None:
                low = (getattr(bound, attribute), allowed)
        for attribute, allowed in (("le", True), ("lt", False)):
            if getattr(bound, attribute, None) is not None:
                high = (getattr(bound, attribute), allowed)
    return Parameter(name, str if choices else annotation, choices, several, positional, low, high)


def all_cases(commands: Mapping[str, Any], samples: Path, most: int) -> list[Case]:
    """Yield all wrong invocations; those of slow commands come last.

    Args:
        most: cases of a damaged file and a command, at most.
    """
    known = {verb: parameters(command.load()) for verb, command in commands.items()}
    missing = sorted(known.keys() ^ VALID.keys())
    if missing:
        raise ValueError(
            f"there is no valid invocation of {', '.join(missing)} to make wrong ones of"
        )
    found = [*_no_command()]
    for verb in known:
        words = (verb, *VALID[verb].split())
        valid = Case("", "", "", words, needs_of(words, samples))
        found += _wrong_flags(valid, known[verb])
        found += _wrong_paths(valid, known[verb])
        found += _environments(valid)
    found += _damaged_files(samples, most)
    found += _several_files(samples)
    unique = {case.name: case for case in found}
    if len(unique) < len(found):
        names = [case.name for case in found]
        raise ValueError(
            f"two cases have one name: {next(name for name in names if names.count(name) > 1)}"
        )
    found = [case for case in found if not case.name.endswith(VALID_AND_LONG)]
    absent = [verb for verb, sample in _LONG_WORK.items() if not (samples / sample).exists()]
    found = [case for case in found if case.verb not in absent or case.kind in _REFUSED_AT_ONCE]
    mixed = sorted(found, key=lambda case: _place(case))
    return sorted(mixed, key=lambda case: case.verb in _LONG_WORK)


def _place(case: Case) -> int:
    return int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8], "big")


def subset(cases: Sequence[Case], every: int) -> list[Case]:
    """Return one of so many cases, and at least one of each command.

    They are chosen by their names: adding or removing a case does not change the choice.
    """
    of_each: dict[str, Case] = {}
    for case in cases:
        of_each[case.verb] = min(case, of_each.get(case.verb, case), key=_place)
    firsts = {case.name for case in of_each.values()}
    return [case for case in cases if _place(case) % every == 0 or case.name in firsts]


def _no_command() -> Iterator[Case]:
    for name, words in {
        "an empty command": ("",),
        "an unknown command": ("nonsense",),
        "a misspelt command": ("pretrian",),
        "a flag for a command": ("--nonsense",),
        "a command in capitals": ("PREPARE",),
        "a command that is not UTF-8": ("\udcff",),
        "a command of 100,000 characters": ("x" * 100_000,),
        "a command with line breaks": ("a\nb\nc",),
        "a command with control characters": ("\x1b[31mred",),
        "a path for a command": ("/etc/passwd",),
        "a version of a version": ("--version", "x"),
    }.items():
        yield Case("flags", "command", f"igpt: {name}", words)


def needs_of(words: Sequence[str], samples: Path, *files: str) -> tuple[str, ...]:
    """Return the samples that words and files name; for a data set in parts, all of them."""
    names = {
        Path(word).parts[0]
        for word in (*words[1:], *files)
        if word and (samples / word).parent.exists()
    }
    if "--merge" in words:
        names |= {"cut.1-of-2", "cut.2-of-2"}
    return tuple(sorted(name for name in names if (samples / name).exists()))


def with_flag(words: Sequence[str], flag: str, *values: str) -> tuple[str, ...]:
    """Return the words with a flag set: its value is replaced if it already has one."""
    kept = list(words)
    for spelling in (flag, "-o" if flag == "--out" else flag):
        if spelling in kept:
            at = kept.index(spelling)
            end = at + 1
            while end < len(kept) and not kept[end].startswith("-"):
                end += 1
            del kept[at:end]
    return (*kept, flag, *values)


def positional_words(words: Sequence[str]) -> list[int]:
    """Return the indices of the positional words: those before the first flag."""
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return list(range(1, first))


def _wrong_values(parameter: Parameter) -> Iterator[tuple[str, str]]:
    """Yield (kind, value) of values that a flag must refuse."""
    if parameter.kind in (int, float):
        yield "an empty value", ""
        yield "a word for a number", "x"
        yield "nan", "nan"
        yield "inf", "inf"
        yield "-inf", "-inf"
        yield "1e300", "1e300"
        yield "1e999", "1e999"
        yield "5,000 digits", DIGITS
        yield "-5,000 digits", f"-{DIGITS}"
        yield "10**30", str(10**30)
        yield "2**63", str(2**63)
        yield "-1", "-1"
        yield "a comma", "1,5"
        yield "Arabic digits", "\u0661"
        if parameter.kind is int:
            yield "a fraction", "1.5"
            yield "hexadecimal", "0x10"
            yield "0", "0"
        for bound, step, what in ((parameter.low, -1, "below"), (parameter.high, 1, "above")):
            if bound is not None:
                value, allowed = bound
                wrong = (
                    value + (step if parameter.kind is int else step * 0.001) if allowed else value
                )
                yield f"{what} its bound", f"{int(wrong)}" if parameter.kind is int else f"{wrong}"
    elif parameter.choices:
        yield "an empty value", ""
        yield "none of its choices", "nonsense"
        yield "a choice in capitals", str(parameter.choices[0]).upper()
        yield "two choices", ",".join(map(str, parameter.choices[:2]))
    elif parameter.kind is str and not parameter.is_path:
        yield "an empty value", ""
        yield "a word that means nothing", "nonsense"
        yield "a value that is not UTF-8", "\udcff"
        yield "a value with line breaks", "a\nb"
        yield "5,000 digits", DIGITS
        yield "a value in brackets", "[/red]"


def _wrong_flags(valid: Case, known: Sequence[Parameter]) -> Iterator[Case]:
    base, verb = valid.words, valid.verb
    places = positional_words(base)

    def case(kind: str, name: str, *words: str) -> Case:
        return replace(valid, group="flags", kind=kind, name=f"{verb}: {name}", words=words)

    yield case("unknown flag", "an unknown flag", *base, "--nonsense")
    yield case("unknown flag", "an unknown flag with a value", *base, "--nonsense=1")
    yield case("unknown flag", "an unknown short flag", *base, "-z")
    yield case("unknown flag", "a flag of brackets", *base, "--[/red]")
    yield case("unknown flag", "a flag that is not UTF-8", *base, "--\udcff")
    if verb != "app":  # it would serve the built-in model for ever
        yield case("positional", "no words at all", verb)
    end = 1 + len(places)
    yield case("positional", "a word too many", *base[:end], "more", "words", *base[end:])
    yield case("positional", "an empty word too many", *base, "")
    for at in places:
        before, after = base[:at], base[at + 1 :]
        yield case("positional", f"without {base[at]}", *before, *after)
        yield case("positional", f"an empty word for {base[at]}", *before, "", *after)
        yield case("positional", f"a flag for {base[at]}", *before, "--", *after)
    for one in known:
        flag = one.flag
        if one.positional:
            continue
        misspelt = with_flag(base, f"{flag[:4]}{flag[5:]}x", "1")
        yield case("misspelt flag", f"{flag} misspelt", *misspelt)
        if one.kind is bool:
            yield case("wrong type", f"{flag} maybe", *base, f"{flag}=maybe")
            continue
        yield case("missing value", f"{flag} without a value", *with_flag(base, flag))
        for kind, value in _wrong_values(one):
            yield case(kind, f"{flag}: {kind}", *with_flag(base, flag, value))
        if one.kind in (int, float):
            yield case("repeated", f"{flag} twice", *with_flag(base, flag, "1"), flag, "x")
        if one.kind in (int, float) and one.several:
            mixed, many = with_flag(base, flag, "1", "x"), with_flag(base, flag, *["1"] * 50)
            yield case("too many values", f"{flag} with a word among numbers", *mixed)
            yield case("too many values", f"{flag} with many numbers", *many)


def _make(kind: str, name: str, work: Path) -> None:
    """Make an input or output of a kind at WORK/NAME."""
    path = work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.startswith("a folder"):
        path.mkdir()
        if kind == "a folder of text":
            (path / "a.txt").write_text("hello\n")
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        _make_socket(path)
    elif kind == "a device":  # the same as /dev/zero
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    elif kind == "a gigabyte":
        path.touch()
        os.truncate(path, 1 << 30)
    elif kind == "a link to nothing":
        path.symlink_to("nowhere/at-all")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    else:
        path.write_text("" if kind == "an empty file" else "hello\n")
    if kind.endswith("without permission"):
        path.chmod(0)


def _make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


_INPUTS = (
    "a folder", "a folder of text", "a FIFO", "a socket",
    "a device", "a file of text", "an empty file", "a gigabyte",
    "a link to nothing", "a link to itself",
    "a file without permission", "a folder without permission",
)  # fmt: skip
_NAMES = {
    "missing": "none",
    "missing, in a folder": "none/at/all",
    "in a file": "afile/x",
    "of 300 characters": "x" * 300,
    "of 5,000 characters": "x/" * 2500,
    "in brackets": "[/red]",
    "with a line break": "a\nb",
    "not UTF-8": "\udcff\udcfe",
    "of an unknown user": "~nosuchuser/x",
    "/dev/zero": "/dev/zero",
    "/dev/stdin": "/dev/stdin",
    "/": "/",
    "..": "..",
    "/proc": "/proc/self",
    "an address": "http://127.0.0.1:9/x",
    "an id of the Hub": "nobody/nothing",
    "spaces": "   ",
    "a star": "*",
    "control characters": "\x1b[31mred\x07",
}
_OUTPUT_NAMES = {
    "an empty name": "",
    "/": "/",
    ".": ".",
    "..": "..",
    "in a file": "afile/new",
    "of 300 characters": "x" * 300,
    "/proc": "/proc/new",
    "/dev/full": "/dev/full/new",
    "the input": "INPUT",
    "in the input": "INPUT/new",
    "spaces": "   ",
}
_OUTPUT_ENDINGS = {"without an ending": "", "with another ending": ".xyz", "only an ending": None}
_OUTPUT_KINDS = (
    "a folder", "a folder of text", "a FIFO",
    "a socket", "a device", "a file of text", "an empty file",
    "a link to nothing", "a link to itself",
    "a file without permission", "a folder without permission",
)  # fmt: skip


def _wrong_paths(valid: Case, known: Sequence[Parameter]) -> Iterator[Case]:
    base = valid.words
    positional = [one for one in known if one.positional]
    places = dict(zip(positional, positional_words(base), strict=False))
    for one in known:
        if not one.is_path:
            continue
        at = places.get(one)
        given = base[at] if at is not None else _value_of(base, one)
        make = _outputs if one.is_output else _inputs
        for kind, value, changes in make(Path(given).suffix, base):
            words = with_flag(base, one.flag, value)
            if at is not None:
                words = (*base[:at], value, *base[at + 1 :])
            name = f"{valid.verb}: {one.flag if at is None else given}: {kind}"
            yield replace(valid, group="paths", kind=kind, name=name, words=words, **changes)


def _value_of(words: Sequence[str], parameter: Parameter) -> str:
    for spelling in (parameter.flag, "-o" if parameter.name == "out" else parameter.flag):
        if spelling in words:
            return words[words.index(spelling) + 1]
    return {"config": "x.yaml", "mask": "x.png", "clusters": "x.npy", "maps": "x.png"}.get(
        parameter.name, ""
    )


def _inputs(ending: str, base: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (kind, path, other fields of the case) of inputs that cannot be read."""
    yield from _odd_paths(_INPUTS, f"odd{ending}")
    for kind, name in _NAMES.items():
        yield kind, name, {"arrange": (partial(_make, "a file of text", "afile"),)}


def _outputs(ending: str, base: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (kind, path, other fields of the case) of outputs that cannot be written, or may not
    be."""
    yield from _odd_paths(_OUTPUT_KINDS, f"odd{ending}")
    first = next((base[at] for at in positional_words(base)), "images")
    for kind, name in _OUTPUT_NAMES.items():
        made = {"arrange": (partial(_make, "a file of text", "afile"),)}
        yield (
            kind,
            name.replace("INPUT", first),
            {**made, "privileges": "other" if kind == "/" else "all"},
        )
    made = {"arrange": (partial(_make, "a folder of text", "closed"), _close)}
    yield "in a closed folder", f"closed/new{ending}", {**made, "privileges": "owner"}
    if not ending:
        return
    for kind, other in _OUTPUT_ENDINGS.items():
        yield kind, ending if other is None else f"new{other}", {}
    neighbour = f"new{'.json' if ending != '.json' else '.png'}"
    for kind in ("a FIFO", "a folder of text"):
        yield f"{kind} next to it", f"new{ending}", {"arrange": (partial(_make, kind, neighbour),)}


def _odd_paths(kinds: Iterable[str], name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for kind in kinds:
        if kind != "a device" or _can_make_devices():
            privileges = "owner" if "permission" in kind else "all"
            yield kind, name, {"arrange": (partial(_make, kind, name),), "privileges": privileges}


@cache
def _can_make_devices() -> bool:
    """Return whether this process may make devices, which root may not in a container."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _make("a device", "device", Path(folder))
        except OSError:
            return False
    return True


def _close(work: Path) -> None:
    (work / "closed").chmod(0o500)


def _environments(valid: Case) -> Iterator[Case]:
    verb = valid.verb

    def case(kind: str, name: str, **changes: Any) -> Case:
        named = replace(valid, group="environment", kind=kind, name=f"{verb}: {name}")
        return replace(named, **changes)

    def variables(kind: str, name: str, program: bool = False, **values: str | None) -> Case:
        return case(kind, name, environment=values, program=program)

    for size in (300, 1500):
        yield case("a full disk", f"files of at most {size} bytes", file_size=size)
    yield case("closed output", "stdout closed", closed=(1,), program=verb in ("plan", "inspect"))
    if verb in ("plan", "inspect", "sample"):
        for name, closed in (
            ("stdin", (0,)),
            ("stdout and stderr", (1, 2)),
            ("stdin, stdout and stderr", (0, 1, 2)),
        ):
            yield case("closed output", f"{name} closed", closed=closed, program=True)
        yield variables("console", "HOME unset", True, HOME=None)
        yield variables("console", "PYTHONIOENCODING=ascii", True, PYTHONIOENCODING="ascii")
    if verb in ("pretrain", "finetune"):
        for name, values in _RANKS.items():
            for value in values:
                yield variables("ranks", f"{name}={value}", **{name: value})
        for name, changes in _TWO_RANKS.items():
            for value in changes:
                text = "unset" if value is None else value
                odd = {**_SECOND_OF_TWO, name: value}
                yield variables("ranks", f"two ranks, {name} {text}", **odd)


_RANKS = {
    "WORLD_SIZE": ("2", "x", "-1", "0"),
    "LOCAL_RANK": ("x", "-1"),
    "RANK": ("5", "x"),
    "LOCAL_WORLD_SIZE": ("0", "x"),
    "OMP_NUM_THREADS": ("x",),
}
_SECOND_OF_TWO: Mapping[str, str | None] = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
_TWO_RANKS: Mapping[str, tuple[str | None, ...]] = {
    "MASTER_PORT": ("x", "99999999", None),
    "MASTER_ADDR": (None, "300.1.1.1"),
    "RANK": ("2", "-1", None),
}


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def _damaged_files(samples: Path, most: int) -> Iterator[Case]:
    seen: dict[str, int] = {}
    for line, files in READS.items():
        for file in files:
            if not (samples / file).exists():  # of samples that were omitted
                continue
            seen[file] = seen.get(file, 0) + 1
            number = most if seen[file] == 1 else most // 4
            words = tuple(line.split())
            needs = needs_of(words, samples, file)
            kind = "/".join(Path(file).parts[-2:])
            name = f"{words[0]} ({seen[file]}): {file}"
            case = Case("files", kind, "", words, needs)
            for what, content in spread(list(damaged(samples / file)), number):
                written = partial(_write, file, content)
                yield replace(case, name=f"{name}: {what}", arrange=(written,))
                if file.startswith("tokens/") and file.endswith(".npy"):
                    changes = (written, partial(_sign, file))
                    yield replace(case, name=f"{name}, signed: {what}", arrange=changes)
            for what in ("removed", "a folder", "a FIFO"):
                yield replace(
                    case, name=f"{name}: {what}", arrange=(partial(_replace, file, what),)
                )


def _write(file: str, content: bytes, work: Path) -> None:
    (work / file).write_bytes(content)


def _replace(file: str, kind: str, work: Path) -> None:
    (work / file).unlink()
    if kind != "removed":
        _make(kind, file, work)


def _sign(file: str, work: Path) -> None:
    """Set the size and checksum of a file in the manifest of a token data set to the current
    ones."""
    path = work / file
    manifest = json.loads((path.parent / "dataset.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if path.name in shard["bytes"]:
                shard["bytes"][path.name] = path.stat().st_size
                shard["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "dataset.json").write_text(json.dumps(manifest))


def _several_files(samples: Path) -> Iterator[Case]:
    """Yield files that are valid individually and inconsistent together, or many at a time."""
    prepare = "prepare images -o new --size 8 --colors 4 --workers 1"
    resume = "pretrain tokens -o stopped --resume"

    def case(name: str, line: str, *arrange: Arrange) -> Case:
        words = tuple(line.split())
        needs = needs_of(words, samples)
        return Case("files", "together", f"together: {name}", words, needs, arrange)

    yield case("a model and its tokens exchanged", "score tokens run")
    yield case("a model for tokens", "inspect run")
    yield case("tokens for a model", "sample tokens")
    yield case("a classifier that is to sample", "sample classifier -o new.png")
    yield case("a model that is to classify", "classify run picture.png")
    yield case("finetune resumes pretrain", "finetune run tokens -o stopped --resume")
    yield case("pretrain resumes finetune", "pretrain tokens -o stopped-classifier --resume")
    yield case("one part of two", "prepare --merge -o cut", partial(remove_sample, "cut.2-of-2"))
    yield case("all images are damaged", prepare, _damage_all)
    yield case("all images are FIFOs", prepare, _pipe_all)
    yield case("all images are folders", prepare, _fold_all)
    yield case("a checkpoint without files", resume, partial(_empty, _CHECKPOINT))
    yield case("a run without its model", "sample stopped", partial(_empty, "stopped/model"))
    for name in ("step-x", "step-", "step-99999999999999999999", "step--1", "step-00000002.bak"):
        made = partial(_make, "a folder", f"stopped/checkpoints/{name}")
        yield case(f"a checkpoint {name}", resume, made)
    for odd in ("\udcff.png", "a\nb.png", "[red].png", "\x1b[31m.png"):
        renamed = partial(_odd_name, odd)
        yield case(f"an image named {odd!r}", prepare, renamed)
        spoilt = f"{prepare} --max-bad 0"
        yield case(f"a damaged image named {odd!r}", spoilt, renamed, partial(_spoil, odd))
        yield case(f"a class named {odd!r}", prepare, partial(_odd_class, odd))


_CHECKPOINT = "stopped/checkpoints/step-00000002"


def remove_sample(name: str, work: Path) -> None:
    """Remove a sample of a case."""
    shutil.rmtree(work / name)


def _empty(folder: str, work: Path) -> None:
    for path in (work / folder).iterdir():
        path.unlink()


def _pictures(work: Path) -> list[Path]:
    return sorted((work / "images").rglob("*.png"))


def _damage_all(work: Path) -> None:
    for path in _pictures(work):
        path.write_bytes(path.read_bytes()[:40])


def _pipe_all(work: Path) -> None:
    for path in _pictures(work):
        path.unlink()
        os.mkfifo(path)


def _fold_all(work: Path) -> None:
    for path in _pictures(work):
        path.unlink()
        path.mkdir()


def _odd_name(name: str, work: Path) -> None:
    (work / "images/train/a/0.png").rename(work / "images/train/a" / name)


def _spoil(name: str, work: Path) -> None:
    (work / "images/train/a" / name).write_bytes(b"no image")


def _odd_class(name: str, work: Path) -> None:
    for split in ("train", "test"):
        (work / "images" / split / "a").rename(work / "images" / split / name)
