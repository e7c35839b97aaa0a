"""Fine-tuning by the command line: it learns, chooses by validation, resumes, and refuses what does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.data.prepare import PrepareConfig, prepare
from igpt.data.tokens import TokenDataset
from igpt.errors import InputError
from igpt.model.transformer import ImageGPT, ModelConfig
from igpt.training.finetune import FinetuneConfig, class_logits, finetune
from igpt.training.metrics import read_metrics

FLAGS = ["--steps", 120, "--batch-size", 32, "--learning-rate", "3e-3", "--validate-every", 40, "--precision", "fp32"]


@pytest.fixture(scope="module")
def classifier(igpt, short_run: Path, digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "classifier"
    done = igpt("finetune", short_run, digits.path, "-o", run, *FLAGS, "--checkpoint-every", 40)
    assert done.returncode == 0, done.stderr
    return run


def test_accuracy_is_real_and_chosen_on_validation(classifier: Path, digits: TokenDataset) -> None:
    result = json.loads((classifier / "test.json").read_text())
    model = ImageGPT.from_pretrained(classifier / "model")
    assert model.config.class_names == tuple("0123456789")
    test = digits["test"]
    with torch.no_grad():
        tokens = torch.from_numpy(test.rows(np.arange(len(test))).astype(np.int64))
        predicted = (list(model.features(tokens))[-1].mean(1) @ model.score.weight.t()).argmax(1).numpy()
    assert result["test_accuracy"] == pytest.approx((predicted == test.labels).mean())
    assert result["test_accuracy"] > 0.3, "ten classes: chance is 0.1"
    errors = {line["step"]: line["error"] for line in read_metrics(classifier / "metrics.jsonl") if "error" in line}
    assert result["best_step"] == min(errors, key=lambda step: (errors[step], step))
    assert result["validation_accuracy"] == pytest.approx(1 - min(errors.values()))


def test_resume_gives_the_same_classifier(
    igpt, classifier: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["finetune", short_run, digits.path, "-o", run, *FLAGS, "--checkpoint-every", 40]
    assert igpt(*words).returncode == 0
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "state.json").unlink()
    done = igpt("finetune", short_run, digits.path, "-o", run, "--resume")
    assert done.returncode == 0, done.stderr
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (run, classifier)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("objective", ["bert", "autoregressive"])
def test_without_a_generative_loss_it_resumes_too(objective: str, digits: TokenDataset, tmp_path: Path) -> None:
    shape = {"resolution": 8, "n_colors": 17, "n_layer": 1, "n_embd": 16, "n_head": 2, "objective": objective}
    ImageGPT(ModelConfig.layered(shape), digits.palette).save_pretrained(tmp_path / "model")
    settings = {"model": tmp_path / "model", "tokens": digits.path, "generation_weight": 0.0, "steps": 6}
    sizes = {"batch_size": 8, "precision": "fp32", "validate_every": 3, "checkpoint_every": 3}
    config = FinetuneConfig.layered(settings, sizes)
    finetune(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    finetune(config, tmp_path / "cut", resume=True)
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_patience_stops_early(short_run: Path, digits: TokenDataset, tmp_path: Path) -> None:
    # The rate is zero in fp32: the head stays at zero, which any change of it, however small, would tell apart.
    settings = {"model": short_run / "model", "tokens": digits.path, "learning_rate": 1e-60, "validate_every": 2}
    config = FinetuneConfig.layered(
        {**settings, "steps": 50, "patience": 2, "batch_size": 8, "precision": "fp32"}, {"checkpoint_every": 4}
    )
    finetune(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["kind"] == "end"
    assert last["step"] == 6, "the first validation is the best; two more follow"
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)  # as if it had been killed after the first of those two
    finetune(config, tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    finetune(config, tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6, "it had stopped early; it stays stopped"


def test_head_starts_at_zero_so_that_all_classes_are_alike(short_run: Path, digits: TokenDataset) -> None:
    model = ImageGPT.from_pretrained(short_run / "model")
    with_head = ImageGPT(model.config.model_copy(update={"class_names": ("a", "b")}), model.palette)
    assert not class_logits(with_head, digits["test"].rows([0, 1])).any()


def test_what_does_not_fit_is_refused(short_run: Path, photographs: Path, tmp_path: Path) -> None:
    plain = prepare(str(photographs), tmp_path / "plain", PrepareConfig(size=8, colors=17, label_column="none"))
    base = {"model": short_run / "model"}
    with pytest.raises(InputError, match="has no classes"):
        finetune(FinetuneConfig.layered({**base, "tokens": plain.path}), tmp_path / "run")
    other = prepare(str(photographs), tmp_path / "other", PrepareConfig(size=8, colors=17))
    with pytest.raises(InputError, match="the palettes differ"):
        finetune(FinetuneConfig.layered({**base, "tokens": other.path}), tmp_path / "run")
    wide = prepare(str(photographs), tmp_path / "wide", PrepareConfig(size=16, colors=17))
    with pytest.raises(InputError, match="the model sees 8 px"):
        finetune(FinetuneConfig.layered({**base, "tokens": wide.path}), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is begun before all is known to fit"
