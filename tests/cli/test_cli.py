"""The command line: a user's mistake is one line and exit code 2; each command does what its help
describes."""

import contextlib
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.cli import COMMANDS, main
from igpt.cli.parser import Options, flags_of, parse, settings_class
from igpt.cli.run import Command, run_command
from igpt.config import Config, read_settings
from igpt.console import close_streams, open_streams
from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.transformer import ImageGPT
from igpt.outputs import require_writable
from igpt.training.presets import ADAPTING, MODELS


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for words in said:
        assert words in done.stderr


MISTAKES = [
    (["prepair"], "no command 'prepair'; did you mean 'prepare'?"),
    (
        ["prepare", "digits", "--sise", "8", "-o", "x"],
        "unknown flag --sise (see igpt prepare --help); did you mean --size?",
    ),
    (["prepare", "digits"], "--out"),
    (["evaluate", "m", "n"], "this command is now: igpt score MODEL NAME --published"),
    (["score", "m", "n", "--published", "--maps", "x.png"], "cannot be combined with --maps"),
    (["score", "m", "n", "--published", "--split", "x"], "cannot be combined with --split"),
    (["pretrain", "t", "-o", "x", "--steps", "1.5"], "'1.5' is not a whole number"),
    (["plan", "tiny", "extra"], "unexpected argument 'extra'"),
    (["prepare", "digits", "-o", "x", "--size", "many"], "--size"),
    (
        ["prepare", "digits", "-o", "x", "--size", "1"],
        "size = 1: Input should be greater than or equal to 2",
    ),
    (["prepare", "digits", "-o", "x", "--filter", "sinc"], "--filter"),
    (["prepare", "no/such/folder", "-o", "x"], "no/such/folder"),
    (["prepare", "./nothing", "-o", "x"], "no folder or file ./nothing"),
    (
        ["pretrain", "t", "-o", "x", "--model", "igpt-x"],
        "no preset 'igpt-x'; did you mean 'igpt-xl'?",
    ),
    (["pretrain", "t", "-o", "x"], "name a model: --model PRESET"),
    (
        ["pretrain", "t", "-o", "x", "--model", "tiny"],
        "no token data set at t: dataset.json is missing",
    ),
    (
        ["pretrain", "t", "-o", "x", "--model", "tiny", "--device", "cuda"],
        "there is no GPU here",
    ),
    (
        ["pretrain", "t", "-o", "x", "--config", "none.yaml"],
        "no settings file at .: none.yaml is missing",
    ),
    (["probe", "./model", "t"], "no model directory model"),
    (["sample", "/none"], "no model directory /none"),
    (["report", "none"], "none"),
    (["import", "none/model.ckpt", "-o", "x"], "model.ckpt"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes_are_one_line(
    igpt, words: list[str], said: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "cuda" in words:
        import torch

        if torch.cuda.is_available():
            said = "no token data set"
    assert_refused(igpt(*words), said)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}], ids=str)
def test_mistakes_are_one_plain_line_on_a_terminal(
    igpt, variables: dict[str, str], tmp_path: Path
) -> None:
    several = [words for words, _ in MISTAKES if "cuda" not in words]
    several += [["classify"], ["pretrain", "t", "--lerning-rate", "3", "-o", "x"]]
    process, terminal = pty.fork()
    if process == 0:  # a forked process has imported everything already
        code = 1
        with contextlib.suppress(BaseException):
            os.chdir(tmp_path)
            os.environ |= {"TERM": "xterm-256color", **variables}
            open_streams()
            code = 0 if all(main(words) == 2 for words in several) else 1
            close_streams()
        os._exit(code)
    said = b""
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", 0) as file:  # EIO at the end
        while part := file.read(4096):
            said += part
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, said
    lines = said.decode().split("\r\n")
    assert len(lines) == len(several) + 1, said
    assert all(line.isprintable() for line in lines), said
    assert "did you mean --learning-rate?" in lines[-2]


def test_unknown_key_in_a_settings_file(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("learning_rat: 0.1\n")
    done = igpt(
        "pretrain",
        digits.path,
        "-o",
        tmp_path / "run",
        "--model",
        "tiny",
        "--config",
        tmp_path / "my.yaml",
    )
    assert_refused(done, "unknown key 'learning_rat'", "did you mean 'learning_rate'?")


def test_flags_override_a_file_which_overrides_a_preset(
    igpt, digits: TokenDataset, tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text("n_layer: 1\nn_embd: 16\nsteps: 3\nlearning_rate: 0.01\n")
    words = [
        "-o",
        tmp_path / "run",
        "--model",
        "tiny",
        "--config",
        tmp_path / "my.yaml",
        "--learning-rate",
        "0.02",
    ]
    assert igpt("pretrain", digits.path, *words, "--validation-images", 8).returncode == 0
    settings = read_settings(tmp_path / "run" / "config.yaml")
    assert settings["n_head"] == MODELS["tiny"]["n_head"]
    assert (settings["n_layer"], settings["steps"], settings["learning_rate"]) == (1, 3, 0.02)
    assert settings["precision"] in ("bf16", "fp32"), "the recorded settings are resolved"


def test_invalid_numbers_of_heads_are_refused_before_anything_is_written(
    igpt, digits: TokenDataset, tmp_path: Path
) -> None:
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", "--model", "tiny", "--n-head", "3")
    assert_refused(done, "3 heads do not divide a width of 64")
    assert not (tmp_path / "run").exists()


def test_truncated_shard_and_truncated_weights(
    igpt, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits.path, tmp_path / "tokens")
    os.truncate(tmp_path / "tokens" / "train-00000.tokens.npy", 5000)
    done = igpt("pretrain", tmp_path / "tokens", "-o", tmp_path / "run", "--model", "tiny")
    assert_refused(done, "train-00000.tokens.npy is damaged: 5000 bytes")
    assert not (tmp_path / "run").exists()
    shutil.copytree(short_run / "model", tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 5000)
    assert_refused(igpt("sample", tmp_path / "model"), "model.safetensors is damaged")


def test_a_model_and_tokens_that_do_not_match_are_refused(
    igpt, short_run: Path, photographs: Path, tmp_path: Path
) -> None:
    other, wide = tmp_path / "other", tmp_path / "wide"
    assert igpt("prepare", photographs, "-o", other, "--size", 8, "--colors", 17).returncode == 0
    assert (
        igpt(
            "prepare", photographs, "-o", wide, "--size", 12, "--palette", short_run / "model"
        ).returncode
        == 0
    )
    mine, theirs = (
        ImageGPT.from_pretrained(short_run / "model").palette,
        TokenDataset(other).palette,
    )
    for command in ("probe", "score"):
        assert_refused(
            igpt(command, short_run, other), mine.fingerprint[:12], theirs.fingerprint[:12]
        )
        assert_refused(igpt(command, short_run, wide), "the model sees 8 px", "12 px")


def test_a_bert_model_cannot_be_sampled_autoregressively(
    igpt, digits: TokenDataset, tmp_path: Path
) -> None:
    shape = {
        "resolution": 8,
        "n_colors": 17,
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "objective": "bert",
    }
    ImageGPT(ModelConfig.layered(shape), digits.palette).save_pretrained(tmp_path / "bert")
    for command in (
        ["score", tmp_path / "bert", digits.path],
        ["sample", tmp_path / "bert", "-o", tmp_path / "s.png"],
    ):
        assert_refused(igpt(*command), "trained as 'autoregressive'; this one is 'bert'")
    assert not (tmp_path / "s.png").exists()
    done = igpt(
        "complete",
        tmp_path / "bert",
        "--tokens",
        digits.path,
        "--count",
        2,
        "-o",
        tmp_path / "c.png",
    )
    assert done.returncode == 0, done.stderr  # BERT models complete instead


def test_samples_are_pictures_that_depend_on_the_seed(
    igpt, short_run: Path, tmp_path: Path
) -> None:
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = igpt(
            "sample", short_run, "-o", tmp_path / f"{name}.png", "--count", 3, "--seed", seed
        )
        assert done.returncode == 0, done.stderr
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 0


def test_completion_keeps_the_upper_rows_of_files(igpt, short_run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50), dtype=np.uint8)).save(
        tmp_path / "wide.png"
    )
    done = igpt(
        "complete", short_run, tmp_path / "wide.png", "-o", tmp_path / "out.png", "--keep-rows", 3
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size[0] > 5 * 8
    (tmp_path / "text.png").write_text("no picture")
    assert_refused(igpt("complete", short_run, tmp_path / "text.png"), "text.png", "not an image")
    assert_refused(igpt("complete", short_run, tmp_path / "none.png"), "no such file")
    assert_refused(igpt("complete", short_run), "give image files")
    assert_refused(igpt("complete", short_run, tmp_path / "wide.png", "--keep-rows", 9), "0..8")


def test_a_folder_of_images_is_completed(
    igpt, short_run: Path, builtin_model: Path, photographs: Path, tmp_path: Path, monkeypatch
) -> None:
    """Of 24 images, two are shown. The built-in model is used if there is only the folder."""
    monkeypatch.chdir(tmp_path)
    folder = photographs / "train" / "down"
    words = ["--completions", "1", "--keep-rows", "4"]
    done = igpt("complete", short_run, folder, *words, "--count", 2, "-o", "folder.png")
    assert done.stdout.startswith("2 of 24 images, spread evenly; --count sets the number\n")
    files = [folder / "00.png", folder / "24.png"]
    assert igpt("complete", short_run, *files, *words, "-o", "files.png").returncode == 0
    assert Path("folder.png").read_bytes() == Path("files.png").read_bytes()
    assert igpt("complete", folder, *words, "--count", 2).returncode == 0
    assert json.loads(Path("completions.json").read_text())
    assert_refused(igpt("complete", short_run, folder, "--count", 0), "--count is at least 1")
    Path("empty").mkdir()
    assert_refused(igpt("complete", "empty"), "there are no images in the folder empty")


def test_numbers_out_of_range_are_refused(
    igpt, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tiny = ["pretrain", digits.path, "-o", run, "--model", "tiny"]
    assert_refused(igpt(*tiny, "--betas", "0.9", "1.0"), "betas")
    assert_refused(igpt(*tiny, "--seed", 10**20), "seed")
    assert not run.exists()
    assert_refused(igpt("sample", short_run, "--seed", 10**20), "a seed lies in")
    assert_refused(igpt("probe", short_run, digits.path, "--limit", -5), "limit = -5")
    assert_refused(igpt("probe", short_run, digits.path, "--seed", -1), "seed = -1")
    assert_refused(
        igpt("prepare", "digits", "-o", tmp_path / "t", "--workers", 0), "at least one worker"
    )
    assert_refused(igpt("sample", short_run, "-o", tmp_path / "s.json"), ".png")
    assert_refused(
        igpt("probe", short_run, digits.path, "--no-baselines", "-o", tmp_path), "is a folder"
    )
    assert_refused(
        igpt("sample", short_run, "--count", 10**12, "-o", tmp_path / "s.png"),
        "do not fit one picture",
    )


def test_a_tiny_temperature_is_nearly_greedy(igpt, short_run: Path, tmp_path: Path) -> None:
    pictures = []
    for temperature in ("0", "1e-42"):
        path = tmp_path / f"{temperature}.png"
        assert (
            igpt(
                "sample", short_run, "-o", path, "--temperature", temperature, "--count", 2
            ).returncode
            == 0
        )
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(*pictures)


def test_help_and_version(igpt) -> None:
    assert "usage: igpt COMMAND" in igpt().stdout
    for name in COMMANDS:
        assert f"  {name} " in igpt("--help").stdout
    assert igpt("--version").stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, igpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits 80 columns, no word is broken, and an example is there."""
    monkeypatch.setenv("COLUMNS", "80")
    done = igpt(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: igpt {name}")
    options = COMMANDS[name].load()
    assert done.stdout.endswith(f"example:\n  {options.example}\n")
    assert max(map(len, done.stdout.splitlines())) < 80
    flags = flags_of(options)
    shown = set(done.stdout.split())
    for flag in flags:
        assert set(flag.help.split()[:-1]) <= shown, flag.name
        assert set(flag.names) <= {word.rstrip(",") for word in shown}, flag.name
    assert "None" not in shown
    if options.groups:
        assert any(f"\n{title}:\n" in done.stdout for title in options.groups)
        assert "\nsettings:\n" not in done.stdout, "every setting has a group"
    for flag in flags:
        assert flag.names or flag.kind in done.stdout.splitlines()[0]
        needed = flag.required or flag.name in options.one_of
        assert not needed or flag.names[0] in re.findall(r"[\w-]+", done.stdout.splitlines()[0])


def test_the_help_of_a_preset_has_its_defaults(igpt) -> None:
    """Every value that the preset sets is shown with its name, and nothing else is."""
    for words, name, recipe in [
        (["--model", "modern"], "modern", MODELS["modern"]),
        (["--model=igpt-m", "-o", "run"], "igpt-m", MODELS["igpt-m"]),
        (["--from", "model"], "--from", ADAPTING),
    ]:
        shown = " ".join(igpt("pretrain", "tokens", *words, "--help").stdout.split())
        defaults = re.findall(
            rf"--([a-z][a-z-]*)(?:(?! --[a-z]).)*? \(default of {name}: ([^)]*)\)", shown
        )
        assert {flag.removeprefix("no-"): default for flag, default in defaults} == {
            key.replace("_", "-"): "on" if value is True else str(value)
            for key, value in recipe.items()
        }
    assert "(default of photos: cpu)" in " ".join(igpt("plan", "photos", "--help").stdout.split())
    assert "default of" not in igpt("pretrain", "--help").stdout
    assert_refused(igpt("pretrain", "--model", "modrn", "--help"), "did you mean 'modern'?")


def test_output_into_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m igpt --help | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr


def test_completing_with_a_mask_keeps_its_dark_pixels(
    igpt: Callable[..., subprocess.CompletedProcess[str]], short_run: Path, tmp_path: Path
) -> None:
    picture, mask, out = tmp_path / "picture.png", tmp_path / "mask.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(picture)
    hidden = np.zeros((8, 8), np.uint8)
    hidden[2:5, 3:6] = 255
    Image.fromarray(hidden).save(mask)
    done = igpt(
        "complete",
        short_run,
        picture,
        "--mask",
        mask,
        "--completions",
        2,
        "-o",
        out,
        "--precision",
        "fp32",
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(out.with_suffix(".json").read_text())
    assert settings["kept_pixels"] == 64 - 9
    assert settings["precision"] == "fp32"
    both = igpt("complete", short_run, picture, "--mask", mask, "--keep-rows", 2, "-o", out)
    assert both.returncode == 2
    assert "not both" in both.stderr


def settings_of(command: str) -> type[Config] | None:
    return settings_class(COMMANDS[command].load())


def switches() -> list[tuple[str, str]]:
    """Return every boolean setting of every command."""
    found = []
    for command in COMMANDS:
        settings = settings_of(command)
        fields = settings.model_fields if settings else {}
        found += [(command, name) for name, field in fields.items() if field.annotation is bool]
    return found


WORDS = {
    "pretrain": ["t", "-o", "x"],
    "finetune": ["m", "t", "-o", "x"],
    "probe": ["m", "t"],
    "features": ["m", "s"],
    "quality": ["m", "s"],
}
WORDS |= {"score": ["m", "s"], "palette": ["s"], "prepare": ["s", "-o", "x"], "plan": ["tiny"]}
WORDS["features"] += ["-o", "x.npz"]


def test_all_boolean_settings_are_found() -> None:
    assert set(switches()) >= {
        ("pretrain", "flip"),
        ("pretrain", "start_from_palette"),
        ("pretrain", "value_residual"),
        ("finetune", "flip"),
        ("finetune", "fold_back"),
        ("probe", "fold_back"),
        ("probe", "baselines"),
        ("prepare", "stream"),
        ("prepare", "full_decode"),
    }


@pytest.mark.parametrize(("command", "name"), switches())
def test_a_boolean_flag_overrides_a_preset_and_a_file_both_ways(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(command)
    assert settings is not None
    required = {
        key: Path("x") for key, field in settings.model_fields.items() if field.is_required()
    }
    required |= {key: 1 for key in ("n_colors", "resolution") if key in required}
    default = settings.model_fields[name].default
    flag = name.replace("_", "-")
    for below in (None, True, False):
        layer = {} if below is None else {name: below}
        (tmp_path / "my.yaml").write_text(
            "".join(f"{key}: {str(value).lower()}\n" for key, value in layer.items())
        )
        before = default if below is None else below
        for words, expected in (([], before), ([f"--{flag}"], True), ([f"--no-{flag}"], False)):
            parsed = parse(COMMANDS[command].load(), f"igpt {command}", [*WORDS[command], *words])
            assert parsed
            _, flags = parsed
            for underneath in (layer, read_settings(tmp_path / "my.yaml") if layer else {}):
                made = settings.layered(required, underneath, flags)
                assert getattr(made, name) is expected, (below, words)


@pytest.mark.parametrize(("command", "name"), switches())
def test_a_boolean_flag_has_no_value_and_no_abbreviation(
    igpt, command: str, name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flag = name.replace("_", "-")
    for wrong in (
        [f"--{flag}", "False"],
        [f"--{flag}=false"],
        [f"--no-{flag}", "x"],
        [f"--{flag[:-1]}"],
    ):
        more = ["y"] if command == "classify" else []
        done = igpt(command, *WORDS[command], *more, *wrong)
        assert_refused(done, f"see igpt {command} --help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("column", ["none", "auto"])
def test_a_probe_is_suggested_only_for_tokens_with_labels(
    igpt, photographs: Path, tmp_path: Path, column: str
) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    words = ["--size", 4, "--colors", 8, *(["--label-column", "none"] if column == "none" else [])]
    assert igpt("prepare", photographs, "-o", tokens, *words).returncode == 0
    shape = ["--n-layer", 1, "--n-embd", 8, "--n-head", 1, "--steps", 1, "--warmup-steps", 0]
    done = igpt("pretrain", tokens, "-o", run, "--model", "tiny", *shape)
    assert (f"igpt probe {run} {tokens}" in done.stdout) == (column == "auto")
    assert f"igpt report {run}" in done.stdout, done.stderr


def test_flip_of_a_preset_can_be_switched_off(igpt, digits: TokenDataset, tmp_path: Path) -> None:
    assert MODELS["photos"]["flip"] is True
    (tmp_path / "off.yaml").write_text("flip: false\nsteps: 1\n")
    (tmp_path / "one.yaml").write_text("steps: 1\n")
    small = [
        "--model",
        "photos",
        "--n-layer",
        1,
        "--n-embd",
        16,
        "--n-head",
        2,
        "--validation-images",
        8,
    ]
    cases = (
        (["one.yaml"], True),
        (["off.yaml"], False),
        (["one.yaml", "--no-flip"], False),
        (["off.yaml", "--flip"], True),
    )
    for number, ((config, *flags), expected) in enumerate(cases):
        run = tmp_path / f"run-{number}"
        done = igpt(
            "pretrain", digits.path, "-o", run, *small, "--config", tmp_path / config, *flags
        )
        assert done.returncode == 0, done.stderr
        assert read_settings(run / "config.yaml")["flip"] is expected


def test_boolean_settings_of_a_probes_file_are_overridden(
    igpt, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    (tmp_path / "off.yaml").write_text(
        "fold_back: false\nbaselines: false\nstrengths: [0.1]\nlayers: [1]\nlimit: 60\n"
    )
    for flags, folded in (([], False), (["--fold-back"], True)):
        out = tmp_path / "probe.json"
        done = igpt(
            "probe", short_run, digits.path, "--config", tmp_path / "off.yaml", "-o", out, *flags
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(out.read_text())
        assert result["config"]["fold_back"] is folded
        assert not result["config"]["baselines"]


FOLDERS = {
    "demo": ["demo"],
    "reproduce": ["reproduce"],
    "prepare": ["prepare", "digits"],
    "pretrain": ["pretrain", "t", "--model", "tiny"],
    "finetune": ["finetune", "m", "t"],
    "import": ["import", "model.ckpt"],
}
FILES = {
    "palette": ["palette", "digits"],
    "inspect": ["inspect", "t"],
    "models": ["models"],
    "plan": ["plan", "tiny"],
    "classify": ["classify", "m", "a.png"],
    "probe": ["probe", "m", "t"],
    "score": ["score", "m", "s"],
    "report": ["report", "a", "b"],
    "features": ["features", "m", "s"],
    "quality": ["quality", "m", "s"],
    "sample": ["sample", "m"],
    "complete": ["complete", "m", "a.png"],
}


def test_every_output_is_in_the_tables() -> None:
    with_out = {name for name, command in COMMANDS.items() if "out" in command.load().model_fields}
    assert with_out == {*FOLDERS, *FILES}


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_outputs_that_cannot_be_written_are_refused_first(
    igpt, command: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    os.mkfifo("fifo")
    wrong = [
        "/",
        "",
        ".",
        "..",
        "file/x",
        "loop",
        "/dev/null/x",
        "n" * 250,
        "x/" * 3000,
        f"new/{'n' * 300}",
        "loop/x",
    ]
    wrong += ["dangling/x", "dangling/x/y"] if command in FILES else []
    wrong += ["/proc/self/nothing/x"] if os.geteuid() else []
    wrong += (
        ["file", "fifo", "/dev/null"] if command in FOLDERS else ["fifo", "/dev/full", "socket"]
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for out in wrong:
            done = igpt(*(FOLDERS | FILES)[command], "-o", out)
            assert_refused(done)
            assert "no model directory" not in done.stderr, out
            assert len(done.stderr) < 1000
    assert {path.name for path in tmp_path.iterdir()} == {
        "dangling",
        "file",
        "fifo",
        "loop",
        "socket",
    }
    assert Path("file").read_text() == "old"


READ_ONLY = """
import contextlib, io, json, os, sys
from igpt.cli import main

def refused(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return [main(words), err.getvalue()]

commands = json.loads(sys.argv[1])
for words in commands:  # imports what the commands need, which another user may not be able to read
    refused([*words, "-o", "/dev/null/x"])
if os.geteuid() == 0:  # nothing is read-only for root
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print(json.dumps([refused([*words, "-o", "closed/x"]) for words in commands]))
"""


def test_outputs_in_a_read_only_folder_are_refused_first() -> None:
    commands = FOLDERS | FILES
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        Path(folder, "closed").mkdir(mode=0o555)
        words = json.dumps(list(commands.values()))
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, words], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout)
        assert list(Path(folder).rglob("*")) == [Path(folder, "closed")]
    for command, (code, said) in zip(commands, answers, strict=True):
        assert code == 2, (command, said)
        assert len(said.strip().splitlines()) == 1, said
        assert "cannot be written" in said, (command, said)


def test_an_existing_folder_needs_no_permission_in_its_parent() -> None:
    """A mounted folder can be written to, even if nothing can be created next to it."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import igpt.files\n"  # before the user changes, who may not be able to read it
        "from igpt.outputs import require_writable_folder\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"  # root may write everywhere
        "for name in sys.argv[1:]:\n"
        "    try: require_writable_folder(Path(name))\n"
        "    except ValueError as error: print(error)\n"
        "    else: print('fine')\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        around = Path(folder, "around")
        for name, mode in (("mounted", 0o777), ("mounted/closed", 0o555)):
            (around / name).mkdir(parents=True)
            (around / name).chmod(mode)
        (around / "file").touch()
        around.chmod(0o555)
        names = ("mounted", "mounted/run", "mounted/closed", "run", "file/run")
        words = [str(around / name) for name in names]
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True
        )
        around.chmod(0o755)
    assert done.stdout.splitlines() == [
        "fine",
        "fine",
        f"{words[2]} cannot be written: you have no permission to write in {words[2]}",
        f"{words[3]} cannot be written: you have no permission to write in {around}",
        f"{words[4]} cannot be written: {around / 'file'} is not a folder",
    ], done.stderr


@pytest.mark.parametrize("limit", [-1, 0, 255])
def test_names_have_the_usual_length_if_the_file_system_states_no_limit(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pathconf", lambda *_: limit)
    require_writable(tmp_path / ("x" * 215))
    with pytest.raises(InputError, match="a name has at most 215 bytes"):
        require_writable(tmp_path / ("x" * 216))


class Fail(Options):
    """Run out of memory."""

    settings = "igpt.config"
    example = "igpt fail"

    def execute(self, given: dict[str, object]) -> None:
        raise MemoryError


def test_out_of_memory_suggests_no_flags_that_the_command_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command({"fail": Command(f"{__name__}:Fail", "")}, ["fail"]) == 2
    assert (
        capsys.readouterr().err
        == "igpt fail: out of memory; try fewer or smaller images at a time\n"
    )


def test_files_are_written_through_links(igpt, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "plan.json")
    for _ in range(2):
        assert igpt("plan", "tiny", "-o", tmp_path / "link.json").returncode == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there" / "plan.json").read_text())["preset"] == "tiny"


BIG = "9" * 23
TRAIN = ["pretrain", "t", "-o", "x", "--model", "tiny"]


@pytest.mark.parametrize(
    "words",
    [
        *(
            [*TRAIN, f"--{flag}", value]
            for flag in ("steps", "seed", "n-layer")
            for value in ("1e9999", "nan", "", "-1")
        ),
        [*TRAIN, "--seed", BIG],
        [*TRAIN, "--seed", "9" * 5000],
        *([*TRAIN, "--learning-rate", value] for value in ("nan", "1e9999", "", "-inf")),
        *([*TRAIN, "--betas", "0.9", value] for value in ("nan", "1e9999", "")),
        ["prepare", "digits", "-o", "x", "--size", BIG],
        ["prepare", "digits", "-o", "x", "--workers", "1e9999"],
        ["prepare", "digits", "-o", "x", "--shard", f"1/{'9' * 5000}"],
        ["prepare", "digits", "-o", "x", "--shard", "²/3"],
        *(["reproduce", "-o", "x", "--minutes", value] for value in ("nan", "inf", "0", "1e9999")),
        *([*TRAIN, "--minutes", value] for value in ("nan", "inf", "0", "-1")),
        ["reproduce", "-o", "x", "--jobs", "0"],
        ["score", "m", "s", "--limit", "0"],
        ["plan", ""],
        ["plan", "tiny", "--gpus", BIG],
        ["app", "m", "--port", "x"],
        [""],
        ["--config"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_invalid_numbers_are_refused_in_one_line(
    igpt, words: list[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = igpt(*words)
    assert_refused(done)
    assert len(done.stderr) < 12_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["temperature", "top-p", "top-k", "seed", "count"])
@pytest.mark.parametrize("value", ["nan", "1e9999", "", "-1", BIG])
def test_invalid_numbers_of_a_sampling_command_are_refused_in_one_line(
    igpt, short_run: Path, flag: str, value: str, tmp_path: Path
) -> None:
    done = igpt("sample", short_run, "-o", tmp_path / "s.png", f"--{flag}", value)
    if value == BIG and flag in ("temperature", "top-k"):  # both have a meaning for any height
        assert done.returncode == 0, done.stderr
        return
    assert_refused(done)
    assert list(tmp_path.iterdir()) == []


def test_invalid_settings_files_are_refused_quickly(igpt, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.yaml")
    Path("folder.yaml").mkdir()
    with Path("huge.yaml").open("wb") as file:
        file.truncate(1 << 30)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 30):
        name, below = (
            chr(ord("a") + number % 26) * (1 + number // 26) for number in (level, level - 1)
        )
        bomb += f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n"
    Path("bomb.yaml").write_text(bomb + f"steps: *{name}\n")
    Path("deep.yaml").write_text("steps: " + "[" * 100_000)
    Path("deep.json").write_text('{"steps": ' + "[" * 100_000)
    Path("date.yaml").write_text("seed: 2020-13-45\n")
    Path("digits.yaml").write_text(f"seed: {'9' * 5000}\n")
    Path("list.yaml").write_text("- a\n")
    Path("latin.yaml").write_bytes(b"steps: 1 # \xe9\n")
    known = {path.name for path in tmp_path.iterdir()}
    for config in (*sorted(known), "missing.yaml", "", "/dev/zero", "n" * 300):
        assert_refused(igpt(*TRAIN, "--config", config))
    assert {path.name for path in tmp_path.iterdir()} == known
