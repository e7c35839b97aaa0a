"""Commands as processes: signals, closed streams, other encodings, and no home folder."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.tokens.dataset import TokenDataset

Run = Callable[..., subprocess.CompletedProcess[str]]
IGPT = [sys.executable, "-m", "igpt"]
SECONDS = 120  # a command that takes longer hangs
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(
    *words: object,
    environment: Mapping[str, str] | None = None,
    without: tuple[str, ...] = (),
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in without}
    return subprocess.run(
        [*IGPT, *(os.fspath(word) if isinstance(word, Path) else str(word) for word in words)],
        env={**kept, **(environment or {})},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        cwd=cwd,
        timeout=SECONDS,
    )


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $IGPT is the program."""
    environment = {**os.environ, "IGPT": shlex.join(IGPT)}
    return subprocess.run(
        ["bash", "-c", line],
        env=environment,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=SECONDS,
    )


@pytest.fixture(scope="module")
def cyrillic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of images in two classes whose names are not Latin."""
    folder = tmp_path_factory.mktemp("cyrillic") / "картинки 🦊"
    generator = np.random.default_rng(0)
    for index in range(40):
        class_folder = folder / "train" / ("кот" if index % 2 else "犬")
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            class_folder / f"{index:02d}.png"
        )
    return folder


@pytest.mark.parametrize("environment", [ASCII, C_LOCALE], ids=["ascii", "C"])
def test_cyrillic_names_on_any_console(
    cyrillic: Path, environment: Mapping[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "знаки"
    done = run(
        "prepare",
        cyrillic,
        "-o",
        out,
        "--size",
        8,
        "--colors",
        16,
        "--workers",
        1,
        environment=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert TokenDataset(out).class_names == ["кот", "犬"]
    inspected = run("inspect", out, environment=environment)
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert (r"\u043a\u043e\u0442" if environment is ASCII else "кот") in inspected.stdout


VERBS = """
import json, sys
from igpt.console import open_streams
open_streams()
from igpt.cli import main
for words in json.load(sys.stdin):
    if main(words) != 0:
        sys.exit(f"igpt {words} failed")
"""


def test_every_command_on_an_ascii_console(cyrillic: Path, tmp_path: Path) -> None:
    data, run, tuned = (str(tmp_path / name) for name in ("знаки", "прогон", "классы"))
    picture = str(next((cyrillic / "train" / "кот").glob("*.png")))
    short = [
        "--steps",
        "4",
        "--validate-every",
        "2",
        "--checkpoint-every",
        "4",
        "--batch-size",
        "8",
    ]
    commands = [
        ["prepare", str(cyrillic), "-o", data, "--size", "8", "--colors", "16", "--workers", "1"],
        ["inspect", data],
        ["palette", str(cyrillic), "-o", str(tmp_path / "цвета.npy"), "--colors", "16"],
        ["plan", "tiny"],
        ["pretrain", data, "-o", run, "--model", "tiny", "--n-layer", "1", *short],
        ["probe", run, data, "--no-baselines", "--strengths", "1", "--layers", "1"],
        ["finetune", run, data, "-o", tuned, *short],
        ["classify", tuned, picture, "-o", str(tmp_path / "ответы.json")],
        [
            "score",
            run,
            data,
            "-o",
            str(tmp_path / "потери.csv"),
            "--maps",
            str(tmp_path / "карты.png"),
            "--count",
            "2",
        ],
        ["features", run, data, "-o", str(tmp_path / "признаки.npz")],
        ["sample", run, "--count", "2"],
        ["complete", run, picture, "--completions", "2"],
        ["report", run],
        ["card", run, "someone/model"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", VERBS],
        input=json.dumps(commands),
        env={**os.environ, **ASCII},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert r"\u043a\u043e\u0442" in done.stdout
    answers = json.loads((tmp_path / "ответы.json").read_text(encoding="utf-8"))
    assert {one["class"] for one in answers["images"][0]["classes"]} == {"кот", "犬"}


@pytest.mark.parametrize(
    "words", [["--help"], ["prepare", "--help"], ["--version"], [], ["нет"], ["plan", "нет"]]
)
def test_help_and_mistakes_on_an_ascii_console(words: list[str]) -> None:
    done = run(*words, environment=ASCII)
    mistaken = "нет" in words
    assert done.returncode == (2 if mistaken else 0)
    assert len(done.stderr.splitlines()) == (1 if mistaken else 0)
    assert (done.stdout + done.stderr).isascii()
    assert done.stdout or mistaken


ODD = [
    "q[/old] [bold]x[/]",
    "new\nline",
    "quotes'\"`$",
    "fox 🦊",
    os.fsdecode(b"not utf-8 \xff\xfe"),
    "bell\a\x1b[31m",
]


def test_unusual_names_of_folders_and_files(igpt: Run, short_run: Path, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*ODD)
    folder.mkdir(parents=True)
    # safetensors reads no file whose path is not UTF-8, so the model is above that folder.
    (folder.parents[1] / "run").symlink_to(short_run)
    pictures = [folder / f"{name.replace('/', '|')}.png" for name in ODD]
    for picture in pictures:
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture)
    done = run(
        "complete",
        folder.parents[1] / "run",
        *pictures,
        "-o",
        folder / "out.png",
        "--completions",
        1,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(folder / "out.png").width > 0
    for name in ODD:
        refused = igpt("sample", tmp_path / name / "none")
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert "no model directory" in refused.stderr
        assert "\x1b" not in refused.stderr


CLOSED = [
    *(
        ("--help", how)
        for how in ("| head -c 1", ">&-", "2>&-", ">&- 2>&- <&-", "2>&1 | true", "| true")
    ),
    *(("plan tiny", how) for how in (">&-", "| true")),
    *(("no-such-command", how) for how in ("2>&-", "2>&1 | true")),
    ("", "| true"),
    ("--version", ">&-"),
    ("prepare --help", "| true"),
]


@pytest.mark.parametrize(("words", "how"), CLOSED)
def test_closed_streams_are_not_an_error(words: str, how: str) -> None:
    done = shell(f"set -o pipefail; $IGPT {words} {how}")
    assert done.returncode == (2 if words == "no-such-command" else 0)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == 0


@pytest.mark.parametrize("how", ["| true", ">&- 2>&-"])
def test_an_output_is_written_even_if_stdout_is_closed(
    short_run: Path, tmp_path: Path, how: str
) -> None:
    words = shlex.join(["sample", str(short_run), "-o", str(tmp_path / "a.png"), "--count", "1"])
    done = shell(f"set -o pipefail; $IGPT {words} {how}")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.json").exists()


def test_a_full_disk_is_reported() -> None:
    for words in ("--help", "plan --help"):
        done = shell(f"$IGPT {words} > /dev/full")
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("home", [None, "/dev/null/none", "file"])
def test_no_home_folder_is_needed(
    home: str | None, digits: TokenDataset, short_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for name in ("temporary", "work"):
        (tmp_path / name).mkdir()
    environment = {
        "TMPDIR": str(tmp_path / "temporary"),
        "XDG_CACHE_HOME": "",
        "XDG_CONFIG_HOME": "",
    }
    if home is not None:
        environment["HOME"] = str(tmp_path / home)
    without = ("HOME", "HF_DATASETS_CACHE", "HF_HOME", "MPLCONFIGDIR")
    words = (
        "score",
        short_run,
        digits.path,
        "--limit",
        4,
        "-o",
        "scores.csv",
        "--maps",
        "maps.png",
        "--count",
        2,
    )
    done = run(*words, environment=environment, without=without, cwd=tmp_path / "work")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "work" / "maps.png").exists()
    assert not (tmp_path / "work" / "~").exists()
    assert list((tmp_path / "temporary").glob("igpt-*")) == [], "the caches are removed at the end"


def test_caches_named_by_the_user_are_used(tmp_path: Path) -> None:
    chosen = {
        "HOME": "/dev/null/none",
        "MPLCONFIGDIR": str(tmp_path / "m"),
        "HF_HOME": str(tmp_path / "h"),
    }
    code = (
        "import os; from igpt.console import settle_caches; settle_caches()\n"
        "print(os.environ['HF_HOME'], os.environ['MPLCONFIGDIR'])"
    )
    environment = {**os.environ, **chosen}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [chosen["HF_HOME"], chosen["MPLCONFIGDIR"]]


CACHES = """
import atexit, os, shutil, tempfile  # another user may not be able to read them
from igpt.console import settle_caches

if os.geteuid() == 0:  # nothing is read-only for root
    os.setuid(65534)
settle_caches()
print(*sorted({"HF_HOME", "MPLCONFIGDIR"} & os.environ.keys()))
"""


@pytest.mark.parametrize(
    ("made", "replaced"),
    [
        ([], "HF_HOME MPLCONFIGDIR"),
        ([".cache/huggingface"], "MPLCONFIGDIR"),
        ([".cache/huggingface", ".cache/matplotlib"], "MPLCONFIGDIR"),
        ([".cache/matplotlib", ".config/matplotlib"], "HF_HOME"),
        ([".cache/huggingface", ".cache/matplotlib", ".config/matplotlib"], ""),
    ],
)
def test_writable_caches_in_a_read_only_home_are_used(made: list[str], replaced: str) -> None:
    with tempfile.TemporaryDirectory() as home:  # pytest's own folders are closed to other users
        for name in (".cache", ".config", *made):
            Path(home, name).mkdir()
        for name in made:
            Path(home, name).chmod(0o777)
        for name in (".cache", ".config", ""):
            Path(home, name).chmod(0o555)
        assert caches_replaced(home) == replaced
        for name in (".cache", ".config", ""):
            Path(home, name).chmod(0o755)


@pytest.mark.parametrize(("filled", "replaced"), [(True, ""), (False, "HF_HOME")])
def test_a_read_only_cache_of_downloads_is_used(filled: bool, replaced: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o777)
        for name in (".cache", ".cache/matplotlib", ".cache/huggingface"):
            Path(home, name).mkdir()
            Path(home, name).chmod(0o777)
        if filled:
            Path(home, ".cache", "huggingface", "hub").mkdir()
        Path(home, ".cache", "huggingface").chmod(0o555)
        assert caches_replaced(home) == replaced
        Path(home, ".cache", "huggingface").chmod(0o755)


def caches_replaced(home: str) -> str:
    """Return the variables of the caches that get a temporary folder for a user who is not root."""
    without = ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in without} | {
        "HOME": home
    }
    done = subprocess.run(
        [sys.executable, "-c", CACHES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Signals. Python's own start cannot be controlled, so a test waits until the first lines of igpt
# have run.


def begin(words: list[object]) -> subprocess.Popen[str]:
    """Start a command and return as soon as it catches SIGTERM, which Python itself does not."""
    process = subprocess.Popen(
        [*IGPT, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
    return process


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["help", "pretrain", "prepare"])
def test_ctrl_c_at_any_moment_prints_no_traceback(
    command: str, number: signal.Signals, digits: TokenDataset, tmp_path: Path
) -> None:
    delays = (0, 0.1) if command == "help" else (0, 0.3, 1.0)
    running = []
    for index, delay in enumerate(delays):
        words: dict[str, list[object]] = {
            "help": ["--help"],
            "pretrain": [
                "pretrain",
                digits.path,
                "-o",
                tmp_path / f"run-{index}",
                "--model",
                "digits",
            ],
            "prepare": [
                "prepare",
                "digits",
                "-o",
                tmp_path / f"tokens-{index}",
                "--size",
                8,
                "--workers",
                1,
            ],
        }
        process = begin(words[command])
        time.sleep(delay)
        process.send_signal(number)
        running.append(process)
    for process in running:
        _, said = process.communicate(timeout=SECONDS)
        # 0: it had finished. A negative code: it had finished, and Python had removed its handlers;
        # a shell reports that in the same way as 128 + number.
        assert process.returncode in (128 + number, 0, -number), said
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        assert len(said.strip().splitlines()) <= 1, said
        assert "KeyboardInterrupt" not in said


def test_a_signal_during_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """As an exception, it could be printed and dropped there."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nprint('importing', flush=True)\nfor _ in range(50): "
        "time.sleep(0.01)\nprint('imported')\n"
    )
    code = (
        "from igpt.interrupts import exit_at_once, stop_in_order\n"
        "exit_at_once(); stop_in_order()\n"
        "try:\n    import slow\n    while True: pass\n"
        "except KeyboardInterrupt as stop:\n    print(type(stop).__name__)\n"
    )
    for number, expected in ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=SECONDS)
        assert output.split() == ["imported", expected]


def test_a_second_signal_during_an_import_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        "import time\nprint('importing', flush=True)\nwhile True: time.sleep(0.01)\n"
    )
    code = (
        "from igpt.interrupts import exit_at_once, stop_in_order\nexit_at_once(); "
        "stop_in_order(); import endless"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    assert process.returncode == 130


def test_ignored_signals_stay_ignored() -> None:
    """Set by `nohup`, and for the background jobs of a script."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from igpt.interrupts import exit_at_once, stop_in_order\n"
        "exit_at_once(); stop_in_order(); assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("rank", "prints"), [("0", True), ("1", False), ("x", True), ("", True), ("-1", True)]
)
def test_only_rank_0_prints(rank: str, prints: bool, monkeypatch) -> None:
    from igpt.cli.run import is_first_rank

    monkeypatch.setenv("RANK", rank)
    assert is_first_rank() == prints


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_page_is_served_without_a_home_folder_until_a_signal(
    short_run: Path, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "HOME": "/dev/null/none",
        "TMPDIR": str(tmp_path),
        "XDG_CACHE_HOME": "",
    }
    for name in ("GRADIO_TEMP_DIR", "HF_HOME", "MPLCONFIGDIR"):
        environment.pop(name, None)
    with subprocess.Popen(
        [*IGPT, "app", str(short_run), "--port", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "shows the page; Ctrl-C ends it" in line
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == code, said
    assert len(said.splitlines()) == (0 if number == signal.SIGINT else 1), said
    assert list(tmp_path.glob("igpt-*")) == [], "uploads and caches are removed at the end"
