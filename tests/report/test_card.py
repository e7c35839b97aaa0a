"""The model card: its numbers are those of the run's files, and its examples work."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.classifier import class_logits
from igpt.model.transformer import ImageGPT
from igpt.report.card import doubts, push_to_hub, write_card

Run = Callable[..., subprocess.CompletedProcess[str]]
NAME = "someone/digits"


@pytest.fixture(scope="module")
def whole(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run with everything that a card can show."""
    run = tmp_path_factory.mktemp("card") / "whole"
    shutil.copytree(short_run, run)
    for words in (
        ("probe", run, digits.path, "--limit", 200, "--concatenate", 0, 2, "--labels-per-class", 4),
        ("score", run, digits.path, "--limit", 30),
        ("sample", run, "--count", 4),
        ("complete", run, "--tokens", digits.path, "--count", 2, "--completions", 3),
    ):
        done = igpt(*words)
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def classifier(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("card") / "classes"
    few = ("--steps", 4, "--batch-size", 8, "--validate-every", 2, "--precision", "fp32")
    done = igpt("finetune", short_run, digits.path, "-o", run, *few)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def bert(
    igpt: Run,
    digits: TokenDataset,
    short_flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    run = tmp_path_factory.mktemp("card") / "bert"
    done = igpt(
        "pretrain", digits.path, "-o", run, "--model", "tiny", *short_flags, "--objective", "bert"
    )
    assert done.returncode == 0, done.stderr
    return run


def front_of(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def rows_of(card: str) -> list[list[str]]:
    """Return the cells of all tables."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in card.splitlines()
        if line[:1] == "|"
    ]


def facts_of(card: str) -> dict[str, str]:
    return dict(re.findall(r"^- ([^:\n]+): (.+)$", card, re.MULTILINE))


def blocks_of(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def test_a_card_has_the_numbers_of_the_files(whole: Path, digits: TokenDataset) -> None:
    card = write_card(whole, NAME, license="cc-by-4.0").read_text()
    front = front_of(card)
    assert front.pop("model-index")
    assert front == {
        "license": "cc-by-4.0",
        "library_name": "igpt",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["imagegpt", "image-gpt", "autoregressive"],
    }
    assert "\n# Image GPT trained on digits\n" in card
    facts = facts_of(card)
    assert {facts[f"{split} images"] for split in ("train", "validation", "test")} == {
        "1,437",
        "180",
    }
    assert facts["palette"] == f"17 colours, fingerprint `{digits.palette.fingerprint[:12]}`"
    assert (facts["resolution"], facts["source"]) == ("8 \u00d7 8 pixels", "`digits`")
    assert (facts["learning rate"], facts["betas"], facts["seed"]) == (
        "`0.003`",
        "`0.9, 0.95`",
        "`0`",
    )
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    best = min(record["loss"] for record in records if record["kind"] == "validation")
    rows = rows_of(card)
    assert ["This model", f"{best:.3f}", f"{best / np.log(2):.3f}"] in rows
    assert ["Colour frequencies alone", f"{records[0]['unigram_loss']:.3f}"] in [
        row[:2] for row in rows
    ]
    probe = json.loads((whole / "probe.json").read_text())
    for layer in probe["layers"]:
        mark = " (best)" if layer["layer"] == probe["best_layer"] else ""
        low, high = layer["test_interval_95"]
        accuracies = [percent(layer["validation_accuracy"]), percent(layer["test_accuracy"])]
        assert [
            f"{layer['layer']}{mark}",
            *accuracies,
            f"{percent(low)} to {percent(high)}",
        ] in rows
    assert percent(probe["concatenated"]["test_accuracy"]) in next(
        row for row in rows if row[0] == "0, 2 concatenated"
    )
    assert any(row[0].endswith(", 4 labels per class") for row in rows)
    score = json.loads((whole / "score-digits.json").read_text())
    assert f"30 test images of `digits`: {score['nats_per_pixel']:.4f} nats/pixel \u00b1 " in card
    assert "![Samples](samples.png)" in card
    assert "![Completions](completions.png)" in card
    assert "(the upper 4 of 8 pixel rows)" in card
    assert "autoregressive: the model predicts every pixel from those before it." in card
    assert str(whole) not in card
    assert str(digits.path.parent) not in card, "local paths are not published"
    assert "\n\n\n" not in card
    assert "license" not in front_of(write_card(whole, NAME).read_text())


def test_the_hub_reads_the_results(whole: Path, classifier: Path) -> None:
    """huggingface_hub's own loader finds every recorded result in the card's model-index."""
    probe = json.loads((whole / "probe.json").read_text())
    score = json.loads((whole / "score-digits.json").read_text())
    test = json.loads((classifier / "test.json").read_text())
    best = next(row for row in probe["layers"] if row["layer"] == probe["best_layer"])
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    loss = min(record["loss"] for record in records if record["kind"] == "validation")
    data = ModelCard.load(write_card(whole, NAME)).data
    assert data.model_name == NAME
    assert [
        (one.dataset_name, one.dataset_split, one.metric_type, one.metric_name, one.metric_value)
        for one in data.eval_results
    ] == [
        ("digits", "test", "accuracy", "test accuracy", best["test_accuracy"]),
        ("digits", "validation", "loss", "validation loss (nats/pixel)", loss),
        (
            "digits",
            "test",
            "loss",
            "negative log-likelihood (nats/pixel)",
            score["nats_per_pixel"],
        ),
    ]
    (of_classifier,) = ModelCard.load(write_card(classifier, NAME)).data.eval_results
    assert of_classifier.task_type == "image-classification"
    assert of_classifier.metric_value == test["test_accuracy"]


def test_a_run_without_results_has_a_card(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    card = write_card(run, NAME).read_text()
    assert "![" not in card
    assert "95 % interval" not in card
    assert "This model" in card


def picture_of(folder: Path, digits: TokenDataset) -> torch.Tensor:
    """Write a test image to photo.png and photos/a.png; return its tokens [1, 64]."""
    tokens = digits["test"].rows([5])
    image = Image.fromarray(digits.palette.inverse_transform(tokens).reshape(8, 8, 3))
    (folder / "photos").mkdir()
    image.save(folder / "photo.png")
    image.save(folder / "photos" / "a.png")
    return torch.from_numpy(tokens.astype(np.int64))


def run_examples(card: str, run: Path, igpt: Run) -> list[dict[str, object]]:
    """Run the card's commands and programs on a copy of the model; return the variables of each."""
    shutil.copytree(run / "model", "down")
    card = card.replace(NAME, "./down")
    for line in blocks_of(card, "bash")[0].splitlines():
        done = igpt(*line.split()[1:])
        assert done.returncode == 0, (line, done.stderr)
    found = []
    for program in blocks_of(card, "python"):
        variables: dict[str, object] = {}
        exec(program, variables)
        found.append(variables)
    return found


def test_the_examples_of_a_card_work(
    igpt: Run, whole: Path, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = write_card(whole, NAME).read_text()
    monkeypatch.chdir(tmp_path)
    tokens = picture_of(tmp_path, digits)
    ours, theirs = run_examples(card, whole, igpt)
    assert ours["pixels"].shape == (4, 8, 8, 3)
    assert torch.equal(theirs["tokens"], tokens)
    torch.testing.assert_close(theirs["logits"], ours["model"](tokens), rtol=0, atol=1e-4)
    best = json.loads((whole / "probe.json").read_text())["best_layer"]
    assert json.loads((tmp_path / "features.json").read_text())["layer"] == best
    assert (tmp_path / "completions.png").exists()


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (2, "The head width of this model, 16, is a square number"),
        (4, "this model's is 8, and with 2 instead of 2.83 the logits are wrong."),
        (1, "this model's is 32, and with 5 instead of 5.66 the logits are wrong."),
    ],
)
def test_the_required_version_of_transformers(
    short_run: Path, heads: int, said: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "n_head": heads}))
    card = write_card(run, NAME).read_text()
    assert said in card
    for wrong in (None, 0, "2", True):
        (run / "model" / "config.json").write_text(json.dumps({**config, "n_head": wrong}))
        with pytest.raises(InputError, match=rf"config\.json.* n_head = {wrong!r}"):
            write_card(run, NAME)
    assert ("**transformers 5.21 or later is needed.** Versions 4.57 to 5.20 divide" in card) == (
        heads != 2
    )


def test_what_the_data_set_left_out_is_counted_without_paths(
    short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    shutil.copytree(short_run, run)
    shutil.copytree(digits.path, tokens)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"tokens": str(tokens)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = json.loads((tokens / "dataset.json").read_text())
    entry = {"count": 1200, "first": "train /home/me/x.tif", "possible_images": False}
    manifest["made"] |= {
        "config": {"palette": "/home/me/colours.npy"},
        "left_out": {
            "further frames of images": entry,
            "files ending in .txt": entry | {"count": 2},
        },
        "warnings": ["all colours of the palette /home/me/colours.npy lie in 0..1"],
    }
    (tokens / "dataset.json").write_text(json.dumps(manifest))
    card = write_card(run, NAME).read_text()
    assert facts_of(card)["left out"] == "further frames of images: 1,200; files ending in .txt: 2"
    assert facts_of(card)["warning"] == "all colours of the palette colours.npy lie in 0..1"
    assert "/home/me" not in card
    manifest["made"]["palette_error"] = {"mse": 2.0, "psnr_db": "high"}
    (tokens / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"dataset\.json: made\.palette_error\.psnr_db = 'high'"):
        write_card(run, NAME)


def test_a_bad_license_or_card_is_refused_in_one_line(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    for license in ("", "my own\nterms", "[mit]", "-"):
        with pytest.raises(InputError, match="is not the identifier of a license on the Hub"):
            write_card(run, NAME, license=license)
    assert not (run / "README.md").exists()
    for make, words in ((os.mkfifo, "is a FIFO"), (os.mkdir, "is a folder|is not a file")):
        make(run / "README.md")
        for refused in (write_card, push_to_hub):
            with pytest.raises(InputError, match=words):
                refused(run, NAME)
        (run / "README.md").rmdir() if make is os.mkdir else (run / "README.md").unlink()


def test_files_that_cannot_be_uploaded_are_named(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    model = run / "model"
    os.mkfifo(model / "pipe")
    with pytest.raises(InputError, match="pipe is a FIFO; a regular file is needed"):
        push_to_hub(run, NAME)
    (model / "pipe").unlink()
    (model / "more").mkdir()
    with pytest.raises(
        InputError, match="more is not a file; only files are uploaded, so move it elsewhere"
    ):
        push_to_hub(run, NAME)
    (model / "more").rmdir()
    (model / "README.md").write_text("notes")
    with pytest.raises(
        InputError, match="would be one file on the Hub; move one of them elsewhere"
    ):
        push_to_hub(run, NAME)
    (model / "README.md").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no weights: model\.safetensors is missing"):
        push_to_hub(run, NAME)


def test_a_classifier_s_card(
    igpt: Run,
    classifier: Path,
    digits: TokenDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = write_card(classifier, NAME).read_text()
    assert front_of(card)["pipeline_tag"] == "image-classification"
    test = json.loads((classifier / "test.json").read_text())
    low, high = test["test_interval_95"]
    row = ["This classifier", percent(test["test_accuracy"]), f"{percent(low)} to {percent(high)}"]
    assert row in rows_of(card)
    assert "Test accuracy on 180 images" in card
    assert facts_of(card)["10 classes"] == ", ".join(f"`{digit}`" for digit in range(10))
    assert "with\nthe class loss plus the generative loss." in card
    monkeypatch.chdir(tmp_path)
    tokens = picture_of(tmp_path, digits)
    ours, theirs = run_examples(card, classifier, igpt)
    expected = class_logits(ImageGPT.from_pretrained(classifier / "model"), tokens)
    torch.testing.assert_close(ours["probabilities"], expected.softmax(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs["logits"], expected, rtol=0, atol=1e-4)


def test_a_bert_model_s_card(
    igpt: Run, bert: Path, digits: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = write_card(bert, NAME).read_text()
    assert front_of(card)["pipeline_tag"] == "image-feature-extraction"
    assert "its output for this model is meaningless" in card
    assert "from transformers" not in card
    assert "Validation loss per masked pixel" in card
    monkeypatch.chdir(tmp_path)
    picture_of(tmp_path, digits)
    (ours,) = run_examples(card, bert, igpt)
    assert [tuple(layer.shape) for layer in ours["features"]] == [(1, 32)] * 3


def test_special_characters_in_names_are_escaped(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    start = {**json.loads(lines[0]), "source": "/home/me/my `odd` | <b>*set*\n# of images"}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(start), *lines[1:]]) + "\n")
    card = write_card(run, NAME).read_text()
    (title,) = re.findall(r"^# .*$", card, re.MULTILINE)
    assert title == r"# Image GPT trained on my \`odd\` \| \<b\>\*set\* \# of images"
    assert facts_of(card)["source"] == "`my 'odd' | <b>*set* # of images`"
    assert "/home/me" not in card


def test_a_card_replaces_only_cards_and_needs_a_model(
    igpt: Run, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    (run / "README.md").write_text("my notes")
    with pytest.raises(InputError, match="is not a model card written by igpt; move it elsewhere"):
        write_card(run, NAME)
    assert (run / "README.md").read_text() == "my notes"
    (run / "README.md").unlink()
    with pytest.raises(InputError, match="is not a valid name of a model on the Hub"):
        write_card(run, "digits")
    shutil.rmtree(run / "model")
    with pytest.raises(InputError, match="contains no model yet"):
        write_card(run, NAME)
    with pytest.raises(InputError, match="is no run directory"):
        write_card(short_run / "model", NAME)
    assert not (run / "README.md").exists()
    done = igpt("card", run, NAME)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_an_edited_card_is_kept(igpt: Run, short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    card = write_card(run, NAME)
    first = card.read_text()
    assert write_card(run, "someone/else").read_text() != first, "it was not edited"
    unsigned = first.rpartition("\n<!--")[0]
    for edited in (first.replace("## Limits", "## My limits"), f"{first}More.\n", unsigned):
        card.write_text(edited)
        done = igpt("card", run, NAME)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "README.md was edited" in done.stderr
        assert card.read_text() == edited


def test_the_likelihoods_of_all_scored_images_are_in_the_card(
    short_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    for name, loss in (("digits", 1.5), ("photos", 2.25)):
        score = {"format": "igpt-score", "version": 1, "images": 7, "nats_per_pixel": loss}
        score |= {"split": "all", "source": f"/home/me/{name}"}
        (run / f"score-{name}.json").write_text(json.dumps(score))
    card = write_card(run, NAME).read_text()
    assert "7 images of `digits`: 1.5000 nats/pixel" in card
    assert "7 images of `photos`: 2.2500 nats/pixel" in card
    found = [one.metric_value for one in ModelCard.load(run / "README.md").data.eval_results]
    assert found[-2:] == [1.5, 2.25]


def test_the_quality_of_samples_is_in_the_card(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    found = {"format": "igpt-quality", "version": 1, "layer": 1, "source": "my_photos"}
    frechet = {"distance": 0.5, "interval_95": [0.25, 0.75], "images": [500, 480]}
    found |= {"model": "run", "features": "run", "frechet": frechet}
    (run / "quality.json").write_text(json.dumps(found))
    card = write_card(run, NAME).read_text()
    assert r"Frechet distance of samples to my\_photos in layer 1 of this model" in card
    assert "| 500 samples, 480 images | 0.5 | 0.25 to 0.75 |" in card


def test_warnings_about_an_old_card_or_another_name(short_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    card = write_card(run, NAME)
    assert doubts(run, NAME) == []
    assert doubts(run, "someone/else") == ["does not name someone/else"]
    (run / "probe.json").write_text("{}")
    later = card.stat().st_mtime + 1
    os.utime(run / "probe.json", (later, later))
    assert doubts(run, NAME) == ["is older than probe.json"]
