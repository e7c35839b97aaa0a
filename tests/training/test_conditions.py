"""Class-conditional models: their start tokens, labels of batches, resuming, directories."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.data.tokens.dataset import TokenDataset
from igpt.errors import InputError
from igpt.model.conditions import with_conditions
from igpt.model.config import ModelConfig
from igpt.model.cost import count_parameters
from igpt.model.objectives import Autoregressive
from igpt.model.transformer import ImageGPT
from igpt.report.card import write_card
from igpt.training.checkpoints import checkpoints
from igpt.training.metrics import read_metrics
from igpt.training.pretrain import PretrainConfig, _training_batch, pretrain
from igpt.training.pretrained import generative_part

from ..helpers.runs import assert_same_run

Short = dict[str, object]
SHAPE = {"resolution": 4, "n_colors": 5, "n_layer": 2, "n_embd": 16, "n_head": 2}


def conditional_model(names: tuple[str, ...] = ("cat", "dog", "owl")) -> ImageGPT:
    torch.manual_seed(1)
    model = ImageGPT(ModelConfig.layered(SHAPE, {"conditions": names})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def marked(digits: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Return the digits with their class as the colour of the first row."""
    folder = tmp_path_factory.mktemp("marked") / "tokens"
    shutil.copytree(digits.path, folder)
    for file in folder.glob("*.tokens.npy"):
        tokens = np.load(file)
        tokens[:, :8] = np.load(file.with_name(file.name.replace("tokens", "labels")))[:, None]
        np.save(file, tokens)
    return TokenDataset(folder)


@pytest.fixture(scope="module")
def trained(marked: TokenDataset, short: Short, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a conditional run of 60 steps."""
    changes = {"steps": 60, "learning_rate": 1e-2, "validate_every": 30, "checkpoint_every": 30}
    settings = {**short, **changes, "condition": "labels", "tokens": marked.path}
    run = tmp_path_factory.mktemp("conditional") / "run"
    pretrain(PretrainConfig.layered(settings), run)
    return run


def test_a_class_replaces_the_start_token_alone() -> None:
    model, tokens = conditional_model(), torch.randint(0, 5, (4, 16))
    plain, given = model(tokens), model(tokens, labels=torch.tensor([-1, 0, 1, 2]))
    assert torch.equal(plain[0], given[0]), "-1 is no class"
    assert all(not torch.allclose(plain[row], given[row]) for row in (1, 2, 3))
    swapped = conditional_model()
    with torch.no_grad():  # the start token of "dog" in place of that of no class
        swapped.wte.weight[5] = model.wte.weight[7]
    torch.testing.assert_close(swapped(tokens)[2], given[2])
    assert count_parameters(model.config) == sum(each.numel() for each in model.parameters())


def test_labels_are_dropped_as_a_function_of_seed_and_step(
    digits: TokenDataset, short: Short
) -> None:
    from igpt.data.tokens.batches import Batches

    config = PretrainConfig.layered(
        {**short, "tokens": digits.path, "condition": "labels", "label_dropout": 0.25}
    )
    batches = Batches(digits["train"], 8, 400, seed=5)
    config = config.model_copy(update={"seed": 5})
    tokens, labels = _training_batch(Autoregressive(), batches, config, 3)
    true = batches.labels(3)
    assert torch.equal(tokens, batches.tokens(3))
    assert (labels == -1).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(labels[labels >= 0], true[labels >= 0])
    assert torch.equal(_training_batch(Autoregressive(), batches, config, 3)[1], labels)
    other = _training_batch(Autoregressive(), batches, config, 4)[1]
    assert not torch.equal(other == -1, labels == -1)
    never = config.model_copy(update={"label_dropout": 0.0})
    assert torch.equal(_training_batch(Autoregressive(), batches, never, 3)[1], true)


def test_training_uses_the_labels(trained: Path, marked: TokenDataset) -> None:
    model = ImageGPT.from_pretrained(trained)
    assert model.config.conditions == tuple("0123456789")
    images = marked["validation"].spread(32)
    tokens = torch.from_numpy(images.rows(range(32)).astype(np.int64))
    labels = torch.from_numpy(images.labels.astype(np.int64))
    with torch.no_grad():
        right, wrong, none = (
            float(Autoregressive().loss(model, tokens, labels=given)[0]) / 32
            for given in (labels, (labels + 1) % 10, None)
        )
    assert right + 0.01 < none < wrong
    lines = read_metrics(trained / "metrics.jsonl")
    recorded = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert recorded[-1] == pytest.approx(right, abs=1e-5), "validation uses the labels"


def test_a_conditional_run_is_resumed_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    shutil.rmtree(checkpoints(cut / "checkpoints")[0])
    config = PretrainConfig.load(cut / "config.yaml")
    pretrain(config, cut, resume=True)
    assert_same_run(trained, cut, tmp_path)


def test_a_conditional_directory_is_read_again_and_a_plain_one_is_as_before(
    tmp_path: Path,
) -> None:
    model = conditional_model()
    model.save_pretrained(tmp_path / "model")
    again = ImageGPT.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again.wte.weight, model.wte.weight)
    plain = ModelConfig.layered(SHAPE).to_hub()
    assert plain["igpt"] == {"objective": "autoregressive", "resolution": 4}
    assert (plain["model_type"], plain["vocab_size"]) == ("imagegpt", 6)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"model_type": "igpt"', '"model_type": "imagegpt"', "has activation_function = 'a class"),
        ('"dog"', '"cat"', "two classes named 'cat'"),
        ('"dog",', "", "wte.weight is"),
        ('"autoregressive"', '"bert"', "has no start token"),
    ],
)
def test_wrong_conditions_of_a_directory_are_refused(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    conditional_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=said):
        ImageGPT.from_pretrained(tmp_path)


def test_start_tokens_of_known_classes_are_kept_and_new_ones_begin_as_no_class() -> None:
    model = conditional_model()
    other = with_conditions(model, ("owl", "ant", "cat"))
    weights = model.wte.weight
    assert torch.equal(other.wte.weight[:6], weights[:6])
    assert torch.equal(other.wte.weight[6:], weights[[8, 5, 6]])
    plain = with_conditions(model, None)
    assert plain.config.conditions is None
    tokens = torch.randint(0, 5, (2, 16))
    assert torch.equal(plain(tokens), model(tokens))
    assert with_conditions(plain, None) is plain


def test_training_starts_from_models_of_other_classes_or_none(
    igpt: Callable, trained: Path, short_run: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    flags = ("--steps", 1, "--precision", "fp32")
    model = ImageGPT.from_pretrained(trained)
    plain = generative_part(model, digits, None)
    assert plain.config.conditions is None
    for start, more, expected in (
        (trained, (), None),
        (short_run, ("--condition", "labels"), tuple("0123456789")),
    ):
        run = tmp_path / f"from-{start.parent.name}"
        done = igpt("pretrain", digits.path, "--from", start, "-o", run, *flags, *more)
        assert done.returncode == 0, done.stderr
        assert ImageGPT.from_pretrained(run).config.conditions == expected


def test_the_card_describes_the_classes(trained: Path) -> None:
    card = write_card(trained, "me/marked").read_text()
    assert "trained with labels" in card
    assert "with a start token for each of 10 classes" in card
    assert "- 10 classes: `0`, `1`," in card
    assert "igpt sample me/marked --class 0 --guidance 2" in card
    assert "transformers does not support this variant" in card
    assert "--condition labels" in card, "the command of the run"


def test_a_fine_tuned_classifier_has_no_start_tokens_of_classes(
    igpt: Callable, trained: Path, digits: TokenDataset, tmp_path: Path
) -> None:
    run = tmp_path / "classifier"
    done = igpt("finetune", trained, digits.path, "-o", run, "--steps", 1, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    config = ImageGPT.from_pretrained(run).config
    assert (config.conditions, config.class_names) == (None, tuple("0123456789"))


def test_images_without_labels_and_classes_without_images_are_said(
    digits: TokenDataset, short: Short, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(digits.path, tmp_path / "tokens")
    for file in copy.glob("train-*.labels.npy"):
        labels = np.load(file)
        labels[labels == 3] = -1
        np.save(file, labels)
    config = PretrainConfig.layered(
        {**short, "tokens": copy, "condition": "labels", "steps": 1, "warmup_steps": 0}
    )
    pretrain(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "training images have no label, and count as no class" in said
    assert "classes without a training image, whose start tokens are not trained: 3\n" in said
    for file in copy.glob("train-*.labels.npy"):
        np.save(file, np.full_like(np.load(file), -1))
    with pytest.raises(InputError, match=r"needs training images with labels, and .* has none"):
        pretrain(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bert_has_no_condition(igpt: Callable, digits: TokenDataset, tmp_path: Path) -> None:
    words = ("--model", "tiny", "--objective", "bert", "--condition", "labels")
    done = igpt("pretrain", digits.path, "-o", tmp_path / "run", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--condition labels needs a model trained as 'autoregressive'" in done.stderr
    assert not (tmp_path / "run").exists()
