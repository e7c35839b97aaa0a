"""Checkpoints with code or changed bytes: nothing is executed, and nothing damaged is resumed."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.training.checkpoints import VERSION, checkpoints
from igpt.training.optimizer import make_optimizers

from .test_checkpoints import DATA, Saved

METADATA = ".metadata"


class Payload:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.marker, "executed")


def seal(checkpoint: Path) -> None:
    """Update sizes and checksums, as an attacker would."""
    state = json.loads((checkpoint / "state.json").read_text())
    for name in state["files"]:
        content = (checkpoint / name).read_bytes()
        state["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    del state["sha256"]
    state["sha256"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


def replace_metadata(checkpoint: Path, marker: Path) -> None:
    (checkpoint / METADATA).write_bytes(pickle.dumps(Payload(marker)))


def extend_metadata(checkpoint: Path, marker: Path) -> None:
    """Use the metadata's own classes, with one addition."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    metadata.planner_data["model.weight"] = Payload(marker)
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def call_metadata(checkpoint: Path, marker: Path) -> None:
    """Use the oldest protocol, whose names are text: a call of a function by its dotted name."""
    command = f"open({str(marker)!r}, 'w').write('executed')"
    (checkpoint / METADATA).write_bytes(f"cbuiltins\nexec\n(V{command}\ntR.".encode())


def replace_entry(checkpoint: Path, marker: Path) -> None:
    """Put it into an optimizer's setting, which is not a tensor."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    content = (checkpoint / DATA).read_bytes()
    entry = io.BytesIO()
    torch.save(Payload(marker), entry)
    for index, stored in metadata.storage_data.items():
        if index.fqn.endswith(".eps"):
            stored.offset, stored.length = len(content), len(entry.getvalue())
            break
    else:
        raise AssertionError("there is no such setting")
    (checkpoint / DATA).write_bytes(content + entry.getvalue())
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


ATTACKS = [replace_metadata, extend_metadata, call_metadata, replace_entry]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_payloads_work_if_they_are_trusted(
    attack: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """Otherwise the tests below would be meaningless."""
    Saved(tmp_path / "saved", keep=1).save(2)
    checkpoint = tmp_path / "saved" / "step-00000002"
    attack(checkpoint, tmp_path / "marker")
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    if attack is replace_entry:
        content = (checkpoint / DATA).read_bytes()
        for index, stored in metadata.storage_data.items():
            if index.fqn.endswith(".eps"):
                entry = content[stored.offset : stored.offset + stored.length]
                torch.load(io.BytesIO(entry), weights_only=False)
                break
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_checkpoint_is_not_executed(
    attack: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    some = Saved(tmp_path / "saved", keep=2)
    some.save(2, 4)
    for step in (4, 2):
        checkpoint = tmp_path / "saved" / f"step-{step:08d}"
        attack(checkpoint, tmp_path / "marker")
        seal(checkpoint)
        if step == 4:
            reached, notes = some.load()
            assert reached == 2, "the previous one is loaded"
            assert notes[0].startswith(f"skipped: {checkpoint}")
            assert "\n" not in notes[0]
    with pytest.raises(InputError, match="no whole checkpoint"):
        some.load()
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("attack", [extend_metadata, replace_entry])
def test_resuming_refuses_code_in_one_line(
    attack: Callable[[Path, Path], None],
    igpt,
    digits: TokenDataset,
    short_run: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    for checkpoint in checkpoints(run / "checkpoints"):
        attack(checkpoint, tmp_path / "marker")
        seal(checkpoint)
    done = igpt("pretrain", digits.path, "-o", run, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no whole checkpoint" in done.stderr
    assert not (tmp_path / "marker").exists()


def test_resuming_with_recomputed_checksums_is_possible(tmp_path: Path) -> None:
    """The checksums that these tests compute are valid."""
    some = Saved(tmp_path, keep=1)
    some.save(2)
    seal(tmp_path / "step-00000002")
    assert some.load()[0] == 2


@pytest.mark.parametrize("name", [DATA, METADATA, "state.json"])
def test_a_changed_byte_is_detected_in_every_file(name: str, tmp_path: Path) -> None:
    some = Saved(tmp_path, keep=2)
    some.save(2, 4)
    file = tmp_path / "step-00000004" / name
    whole = file.read_bytes()
    counts = [
        offset
        for offset, byte in enumerate(whole)
        if name != "state.json" or not bytes([byte]).isspace()
    ]
    for part in (0, 0.1, 0.3, 0.5, 0.8, 1):
        offset = counts[round(part * (len(counts) - 1))]
        damaged = bytearray(whole)
        damaged[offset] ^= 1
        file.write_bytes(damaged)
        step, notes = some.load()
        assert step == 2, (offset, whole[offset : offset + 1])
        assert notes[0].startswith(f"skipped: {tmp_path}/step-00000004")
        assert "\n" not in notes[0]
    file.write_bytes(whole)
    assert some.load()[0] == 4


def test_every_number_of_the_state_is_covered(tmp_path: Path) -> None:
    """A changed digit still gives JSON of the right types."""
    some = Saved(tmp_path, keep=2)
    some.save(2, 4)
    file = tmp_path / "step-00000004" / "state.json"
    whole = file.read_bytes()
    digits_at = [offset for offset, byte in enumerate(whole) if chr(byte).isdigit()]
    for offset in digits_at[:: max(1, len(digits_at) // 40)]:
        damaged = bytearray(whole)
        damaged[offset] ^= 1
        file.write_bytes(damaged)
        assert some.load()[0] == 2, whole[offset - 20 : offset + 5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "has checkpoint version 2; this igpt reads 3"),
        ({"version": "3"}, "has checkpoint version '3'"),
        ({"step": "4"}, "step = '4'"),
        ({"step": 5}, "its SHA-256 is not the one"),
        ({"files": [1]}, "files = [1]"),
        ({"files": {"a": 3}}, "files.a = 3"),
        ({"best": True}, "best = True"),
    ],
)
def test_a_state_of_another_form_is_refused_with_its_key(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    assert VERSION == 3
    some = Saved(tmp_path, keep=1)
    some.save(4)
    file = tmp_path / "step-00000004" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError) as caught:
        some.load()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(tmp_path: Path) -> None:
    some = Saved(tmp_path, keep=2)
    some.save(2, 4)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000009")
    step, notes = some.load()
    assert step == 2
    assert "holds the state after 4 steps, not after 9" in notes[0]


def test_folders_with_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    some = Saved(tmp_path, keep=2)
    some.save(2)
    for name in ("step-", "step-latest", "step-00000007.bak"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / name)
    (tmp_path / "step-00000008").write_text("")
    assert checkpoints(tmp_path) == [tmp_path / "step-00000002"]
    assert some.load()[0] == 2


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    some, other = Saved(tmp_path, keep=1), Saved(tmp_path, keep=1)
    some.save(2)
    other.model = torch.nn.Linear(4, 2)
    other.optimizers = make_optimizers(other.model, "adamw", betas=(0.9, 0.95), weight_decay=0.0)
    with pytest.raises(InputError, match="does not fit this run"):
        other.load()
