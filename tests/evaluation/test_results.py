"""The two files of a probe belong together, even if their writing is interrupted; malformed ones
are refused in one line."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.evaluation.export import best_layer
from igpt.evaluation.probe import ProbeConfig, probe, write_probe
from igpt.evaluation.probe_classifier import ProbeClassifier
from igpt.evaluation.results import read_probe, read_score
from igpt.locks import exclusive, exclusive_folder
from igpt.model.transformer import ImageGPT

from ..helpers import malformed

QUICK = ("--limit", 150, "--strengths", 0.1, "--layers", 0, "--no-baselines")
RESULT = {
    "format": "igpt-probe",
    "version": 2,
    "classes": 2,
    "images": {"train": 9, "validation": 9, "test": 9},
    "layers": [
        {"layer": layer, "validation_accuracy": 0.5, "test_accuracy": 0.5} for layer in (1, 2)
    ],
    "best_layer": 1,
}
# Writes a second probe over the first, and is killed just before the given rename.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from igpt.evaluation.probe import write_probe
from igpt.evaluation.probe_classifier import ProbeClassifier

path, number, value = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
seen = 0

def watch(event, arguments):
    global seen
    if event == "os.rename":
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

import json
result = json.loads(path.read_text())
coef = torch.full((2, 3), value)
readout = ProbeClassifier(1, ("a", "b"), torch.zeros(3), torch.ones(3), coef, torch.zeros(2))
sys.addaudithook(watch)
write_probe(path, result, readout)
"""


def readout(value: float = 1.0, layer: int = 1) -> ProbeClassifier:
    return ProbeClassifier(
        layer, ("a", "b"), torch.zeros(3), torch.ones(3), torch.full((2, 3), value), torch.zeros(2)
    )


def test_a_classifier_is_read_with_its_probe(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    assert ProbeClassifier.of_probe(path) is None
    write_probe(path, RESULT, readout())
    found = ProbeClassifier.of_probe(path)
    assert found is not None
    assert (found.layer, found.class_names, found.fingerprint) == (
        1,
        ("a", "b"),
        readout().fingerprint,
    )
    assert read_probe(path) == {**RESULT, "classifier": readout().fingerprint}
    path.with_suffix(".safetensors").unlink()
    assert ProbeClassifier.of_probe(path) is None, "the classifier is optional"


def test_a_classifier_of_another_probe_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "probe.json", tmp_path / "other.json"
    write_probe(path, RESULT, readout())
    for result, classifier in (
        (RESULT, readout(2.0)),
        ({**RESULT, "best_layer": 2}, readout(1.0, 2)),
    ):
        write_probe(other, result, classifier)
        other.with_suffix(".safetensors").rename(path.with_suffix(".safetensors"))
        with pytest.raises(
            InputError, match=r"probe\.safetensors is not the classifier of .*probe\.json"
        ):
            ProbeClassifier.of_probe(path)
    path.unlink()
    with pytest.raises(InputError, match=r"probe\.safetensors has no probe\.json next to it"):
        ProbeClassifier.of_probe(path)


def test_a_probe_of_an_earlier_version_keeps_its_classifier(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    write_probe(path, RESULT, readout())
    path.write_text(json.dumps(RESULT))
    assert ProbeClassifier.of_probe(path) is not None


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_between_the_two_files_is_detected(tmp_path: Path, number: int) -> None:
    path = tmp_path / "probe.json"
    write_probe(path, RESULT, readout(1.0))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(number), "2.0"])
    assert killed.returncode == -signal.SIGKILL
    if number == 1:
        found = ProbeClassifier.of_probe(path)
        assert found is not None
        assert found.fingerprint == readout(1.0).fingerprint, "nothing has changed"
    else:
        with pytest.raises(InputError, match="is not the classifier of"):
            ProbeClassifier.of_probe(path)
    write_probe(path, RESULT, readout(3.0))
    found = ProbeClassifier.of_probe(path)
    assert found is not None
    assert found.fingerprint == readout(3.0).fingerprint


def test_a_full_disk_leaves_both_files_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "probe.json"
    write_probe(path, RESULT, readout())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for place in ("igpt.evaluation.probe.sync", "igpt.files.sync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(OSError, match="No space left"):
                write_probe(path, RESULT, readout(2.0))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def full(path: Path) -> None:
    raise OSError(28, "No space left on device")


def damaged_classifiers(path: Path) -> Iterator[str]:
    """Replace `path` by one damaged classifier after the other."""
    whole, tensors = path.read_bytes(), load_file(path)
    about = {"format": "igpt-readout", "version": "1", "layer": "1", "classes": '["a", "b"]'}
    for key in about:
        for value in (
            "",
            "x",
            "-1",
            "9" * 5000,
            "[" * 100_000,
            "[" * 900 + "]" * 900,
            "{}",
            '["a"]',
            '["a", 1]',
            "[]",
        ):
            save_file(tensors, path, metadata={**about, key: value})
            yield f"{key} = {value[:20]}"
        save_file(
            tensors, path, metadata={name: value for name, value in about.items() if name != key}
        )
        yield f"without {key}"
    save_file(tensors, path)
    yield "without metadata"
    for name, tensor in tensors.items():
        save_file(
            {key: value for key, value in tensors.items() if key != name}, path, metadata=about
        )
        yield f"without {name}"
        for other in (
            tensor.double(),
            tensor[None],
            tensor[:1],
            tensor * torch.nan,
            torch.zeros(()),
        ):
            save_file({**tensors, name: other.contiguous()}, path, metadata=about)
            yield f"{name} {other.dtype} {list(other.shape)}"
    for what, content in malformed.contents(whole):
        path.write_bytes(content)
        yield what
    path.write_bytes(whole)
    yield from malformed.others(path)


def test_damaged_classifiers_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(readout().to_bytes())
    for what in damaged_classifiers(path):
        with pytest.raises(InputError, match=r"probe\.safetensors") as refusal:
            ProbeClassifier.load(path)
        assert "\n" not in str(refusal.value), what
    assert ProbeClassifier.load(path).fingerprint == readout().fingerprint


def test_malformed_results_are_refused_in_one_line(tmp_path: Path) -> None:
    score = {
        "format": "igpt-score",
        "version": 1,
        "images": 3,
        "nats_per_pixel": 1.5,
        "standard_error": None,
    }
    score |= {"split": "test", "source": "digits"}
    readers: list[tuple[str, dict[str, Any], Callable[[Path], Any]]] = [
        ("score.json", score, read_score),
        ("probe.json", RESULT, lambda path: best_layer(path.parent)),
    ]
    for name, value, read in readers:
        path = tmp_path / name
        path.write_text(json.dumps(value))
        refused = 0
        for what in malformed.files(path):
            try:
                read(path)
            except InputError as error:
                said, refused = str(error), refused + 1
                assert name in said, what
                assert "\n" not in said, what
        assert refused > 60
        read(path)


@pytest.fixture(scope="module")
def model(short_run: Path) -> ImageGPT:
    return ImageGPT.from_pretrained(short_run / "model")


def test_malformed_features_are_refused_in_one_line(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    config = ProbeConfig(baselines=False, limit=150, strengths=(0.1,), layers=(1,))
    probe(model, digits, config, tmp_path)
    folder = tmp_path / "model" / "validation"
    for name, files in (("features.json", malformed.files), ("layer-001.npy", damaged_arrays)):
        for what in files(folder / name):
            with pytest.raises(InputError, match="validation") as refusal:
                probe(model, digits, config, tmp_path)
            assert "\n" not in str(refusal.value), what
    probe(model, digits, config, tmp_path)


def damaged_arrays(path: Path) -> Iterator[str]:
    """Replace `path` by one damaged array after the other."""
    whole = path.read_bytes()
    for old, new in (
        (b"(150, 32)", b"(32, 150)"),
        (b"(150, 32)", b"(9**9,32)"),
        (b"'<f4'", b"'<i4'"),
        (b"'<f4'", b"'|O8'"),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        yield repr(new)
    path.write_bytes(whole.replace(b"(150, 32)", b"(99999999999999, 99999999999999)"))
    yield "huge"
    for what, content in malformed.contents(whole):
        path.write_bytes(content)
        yield what
    path.write_bytes(whole)
    yield from malformed.others(path)


def test_every_number_that_a_probe_accepts_can_be_read_back(tmp_path: Path) -> None:
    largest = ProbeConfig(
        seed=2**63 - 1,
        limit=2**53,
        test_images=2**53,
        labels_per_class=(2**53,),
        strengths=(1e12,),
        learning_rates=(1e4,),
    )
    settings = largest.model_dump(mode="json")
    rows = [{**row, "regularisation": 1e12, "learning_rate": 1e4} for row in RESULT["layers"]]
    few = {
        "per_class": 2**53,
        "test_accuracies": [0.5, 0.5],
        "mean": 0.5,
        "standard_deviation": 0.0,
    }
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**RESULT, "layers": rows, "few_labels": [few], "config": settings}))
    assert read_probe(path)["config"] == settings
    path.write_text(json.dumps({**RESULT, "config": {**settings, "seed": 2**63}}))
    with pytest.raises(InputError, match="seed"):
        read_probe(path)


@pytest.mark.parametrize(
    "words",
    [
        ("--labels-per-class", 100_000),
        ("--labels-per-class", 2, 10**30),
        ("--strengths", "1e308"),
        ("--strengths", "1e-320"),
        ("--strengths", "nan"),
        ("--strengths", *[0.1] * 65),
        ("--solver", "sgd", "--learning-rates", "1e300"),
        ("--solver", "sgd", "--steps", 10**18),
        ("--solver", "sgd", "--batch-size", 10**12),
        ("--subsets", 10**9),
        ("--masks", 1_000_000),
        ("--limit", 10**40),
        ("--test-images", 10**40),
        ("--seed", 10**40),
        ("--layers", 0, 0),
        ("--layers", 10**30),
        ("--concatenate", 1),
        ("--concatenate", 0, 0),
    ],
)
def test_absurd_settings_are_refused_before_any_work_and_leave_nothing(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path, words: tuple[object, ...]
) -> None:
    folder = tmp_path / "folder"
    for more in ((), ("--features", folder / "features")):
        done = igpt("probe", short_run, digits.path, "-o", folder / "p.json", *words, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert not folder.exists(), "nothing is left, and nothing was started"


def test_an_error_during_a_probe_keeps_the_files_of_the_previous_one(
    igpt: Any,
    short_run: Path,
    digits: TokenDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("probe", short_run, digits.path, "-o", tmp_path / "p.json")
    assert igpt(*words, *QUICK).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["p.json", "p.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr("igpt.evaluation.probe.few_labels", interrupted)
        done = igpt(*words, *QUICK, "--labels-per-class", 2, "--seed", 1)
    assert done.returncode == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_files_that_are_not_classifiers_are_not_replaced(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    weights = {"weight": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors")
    for name, said in (
        ("model.json", "is not a probe's classifier and would be overwritten"),
        ("p.safetensors", ".json"),
    ):
        done = igpt("probe", short_run, digits.path, "-o", tmp_path / name, *QUICK)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], weights["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_two_probes_at_once_are_refused(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from igpt.locks import exclusive, exclusive_folder\n"
        "with exclusive(Path(sys.argv[1])), exclusive_folder(Path(sys.argv[2])): "
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "p.json"), str(tmp_path / "features")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        for words in (
            ("-o", tmp_path / "p.json"),
            ("-o", tmp_path / "q.json", "--features", tmp_path / "features"),
        ):
            done = igpt("probe", short_run, digits.path, *words, *QUICK)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert f"is being written by process {first.pid} on " in done.stderr
        first.communicate(b"\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "out"),
    [("score", "s.csv"), ("features", "f.npz"), ("published", "e.json"), ("score", "s.jsonl")],
)
def test_two_commands_that_write_the_same_files_are_refused(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path, command: str, out: str
) -> None:
    code = (
        "import sys; from pathlib import Path; from igpt.locks import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print(flush=True); input()"
    )
    target = (tmp_path / out).with_suffix(".json")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        more = {"features": ("--layer", 1), "published": ("--published",)}.get(command, ())
        verb = "score" if command == "published" else command
        done = igpt(verb, short_run, digits.path, "-o", tmp_path / out, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"is being written by process {first.pid} on " in done.stderr
        first.communicate(b"\n")
    assert not list(tmp_path.iterdir())


def begun(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Wait until a probe writes features."""
    end = time.monotonic() + 120
    while not any(folder.rglob(".passing/model/.*")) and not list(
        folder.glob(".p.json.passing/model/*")
    ):
        assert process.poll() is None, "it has ended already"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_during_a_probe(
    igpt: Any, short_run: Path, digits: TokenDataset, tmp_path: Path, number: signal.Signals
) -> None:
    words = [
        short_run,
        digits.path,
        "-o",
        tmp_path / "p.json",
        "--labels-per-class",
        10,
        "--subsets",
        1000,
    ]
    command = [sys.executable, "-m", "igpt", "probe", *map(str, words)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        begun(process, tmp_path)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert (tmp_path / ".p.json.passing").exists(), "nothing could remove it"
    else:
        assert process.returncode == 128 + number
        assert said.count("\n") == 1
        assert not list(tmp_path.iterdir()), "neither results, nor features, nor locks"
    assert igpt("probe", short_run, digits.path, "-o", tmp_path / "p.json", *QUICK).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.safetensors"]


def test_a_process_may_hold_its_own_locks(
    model: ImageGPT, digits: TokenDataset, tmp_path: Path
) -> None:
    config = ProbeConfig(baselines=False, limit=150, strengths=(0.1,), layers=(1,))
    with exclusive(tmp_path / "p.json"), exclusive_folder(tmp_path / "features"):
        probe(model, digits, config, tmp_path / "features")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]
