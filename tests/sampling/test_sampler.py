"""Generation against the full forward pass, and its settings."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from igpt.errors import InputError
from igpt.model.config import ModelConfig
from igpt.model.cost import cache_bytes
from igpt.model.precision import Precision
from igpt.model.transformer import ImageGPT
from igpt.sampling.decoder import Decoder
from igpt.sampling.sampler import choose, complete, generate, sample


def random_model(objective: str = "autoregressive", bias: bool = False) -> ImageGPT:
    torch.manual_seed(0)
    shape = {"resolution": 6, "n_colors": 11, "n_layer": 3, "n_embd": 24, "n_head": 3, "bias": bias}
    model = ImageGPT(ModelConfig.layered(shape, {"objective": objective})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits_by_steps(
    model: ImageGPT, tokens: torch.Tensor, prefix: int, precision: Precision
) -> torch.Tensor:
    """Return the decoder's logits at the positions from `prefix` on, [B, n - prefix, V]."""
    sequence = torch.cat([torch.full((len(tokens), 1), model.config.n_colors), tokens], 1)
    said = []
    decoder = Decoder(model, len(tokens), precision)
    decoder.prefill(sequence[:, :prefix])
    for _ in range(prefix, tokens.shape[1]):
        decoder.advance(sequence, lambda position, logits: said.append(logits))
    return torch.stack(said, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 17, 35])
def test_cached_logits_equal_the_full_forward_at_every_position(prefix: int, bias: bool) -> None:
    model = random_model(bias=bias)
    tokens = torch.randint(0, 11, (3, 36))
    found = logits_by_steps(model, tokens, prefix, "fp32")
    torch.testing.assert_close(found, model(tokens)[:, prefix:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 0.03)])
def test_cached_logits_are_as_near_as_the_precision_allows(
    precision: Precision, tolerance: float, batch: int
) -> None:
    """In the packed layout of the processor; the tolerance is relative to the largest logit."""
    model = random_model().float().requires_grad_(False)
    tokens = torch.randint(0, 11, (batch, 36))
    expected = model(tokens)
    found = logits_by_steps(model, tokens, 9, precision)
    assert found.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    torch.testing.assert_close(
        found.float(), expected[:, 9:], rtol=0, atol=tolerance * expected.abs().max().item()
    )


def test_captured_steps_read_more_of_the_cache_than_is_filled() -> None:
    """As on a GPU: a wider span with a mask gives the same logits but for rounding."""
    model = random_model()
    tokens = torch.randint(0, 11, (2, 36))
    decoder = Decoder(model, 2)
    decoder.prefill(torch.cat([torch.full((2, 1), 11), tokens[:, :8]], 1))
    with torch.inference_mode():
        for part in (part for cache in decoder.caches for part in cache):
            part[:, :, 10:] = 100.0  # what no step may see
    torch.testing.assert_close(
        decoder.logits(tokens[:, 8], 36), model(tokens)[:, 9], rtol=0, atol=1e-12
    )


def test_samples_depend_on_seed_and_number_alone() -> None:
    model = random_model()
    originals, known = torch.randint(0, 11, (5, 36)), torch.arange(36) < 12
    *_, together = generate(model, originals, known, seed=3, precision="fp32")
    *_, last = generate(model, originals[4:], known, seed=3, first=4, precision="fp32")
    assert torch.equal(together.tokens[4:], last.tokens)
    assert len({tuple(row) for row in together.tokens[:, 12:].tolist()}) == 5


@pytest.mark.parametrize("by", ["row", "pixel"])
def test_images_are_yielded_step_by_step(by: str) -> None:
    model, originals = random_model(), torch.randint(0, 11, (2, 36))
    steps = list(generate(model, originals, torch.arange(36) < 15, by=by, seed=1))
    assert [int(step.known[0].sum()) for step in steps] == (
        [18, 24, 30, 36] if by == "row" else list(range(16, 37))
    )
    for step in steps:  # what is known stays
        assert torch.equal(step.tokens[step.known], steps[-1].tokens[step.known])
    assert torch.equal(steps[-1].tokens, complete(model, originals, torch.arange(36) < 15, seed=1))


def test_known_pixels_anywhere_and_of_each_image_are_kept_and_seen_by_those_after_them() -> None:
    model = random_model()
    originals = torch.randint(0, 11, (3, 36))
    known = torch.rand(3, 36, generator=torch.Generator().manual_seed(1)) < 0.5
    sampled = complete(model, originals, known, temperature=0, precision="fp32")
    assert torch.equal(sampled[known], originals[known])
    assert torch.equal(sampled[~known], model(sampled).argmax(-1)[~known])
    nothing_open = complete(model, originals, torch.ones(36, dtype=torch.bool))
    assert torch.equal(nothing_open, originals)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_many_images_are_generated_in_several_batches(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, originals = random_model(objective), torch.randint(0, 11, (5, 36))
    whole = complete(model, originals, 2, precision="fp32")
    monkeypatch.setattr("igpt.sampling.sampler._CACHE", 2 * cache_bytes(model.config, 8))
    if objective == "bert":
        monkeypatch.setattr("igpt.sampling.sampler.inference_batch_size", lambda config: 2)
    sizes: list[int] = []

    def counted(model: ImageGPT, tokens: torch.Tensor, *rest: object, **settings: object) -> object:
        sizes.append(len(tokens))
        return generate(model, tokens, *rest, **settings)

    monkeypatch.setattr("igpt.sampling.sampler.generate", counted)
    reported = []
    again = complete(
        model,
        originals,
        2,
        precision="fp32",
        progress=lambda done, total: reported.append((done, total)),
    )
    assert torch.equal(again, whole)
    assert sizes == [2, 2, 1]
    assert reported[-1] == (180, 180)
    assert reported == sorted(reported)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.7}], ids=str
)
def test_captured_steps_give_the_samples_of_the_cpu(settings: dict[str, float]) -> None:
    torch.manual_seed(0)
    shape = {
        "resolution": 14,
        "n_colors": 11,
        "n_layer": 3,
        "n_embd": 24,
        "n_head": 3,
    }  # 196 positions: four captures
    model = ImageGPT(ModelConfig.layered(shape)).double()
    originals, known = torch.randint(0, 11, (3, 196)), torch.arange(196) < 20
    expected = complete(model, originals, known, precision="fp32", **settings)
    model.cuda()
    assert torch.equal(
        complete(model, originals, known, precision="fp32", **settings).cpu(), expected
    )
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(complete, model, originals, known, precision="fp32", **settings)
            for _ in range(2)
        ]
        assert all(torch.equal(job.result().cpu(), expected) for job in jobs)


def test_top_k_takes_no_more_of_equal_colours() -> None:
    logits = torch.zeros(1000, 5)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert len(choose(logits, uniform, 1.0, 2, None).unique()) == 2


def test_weights_that_break_later_are_refused() -> None:
    model = random_model()
    torch.nn.init.constant_(model.wpe.weight[30], torch.nan)
    with pytest.raises(InputError, match="weights are broken"):
        complete(model, torch.zeros(1, 36, dtype=torch.long), 2)


def test_broken_weights_are_refused_at_once() -> None:
    for objective in ("autoregressive", "bert"):
        model = random_model(objective)
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        with pytest.raises(InputError, match="weights are broken"):
            complete(model, torch.zeros(1, 36, dtype=torch.long), 2)


def test_greedy_sampling_is_the_full_forwards_argmax() -> None:
    model = random_model()
    prefix = torch.randint(0, 11, (2, 7))
    sampled = sample(model, prefix, temperature=0, precision="fp32")
    assert torch.equal(sampled[:, :7], prefix)
    assert torch.equal(sampled[:, 7:], model(sampled).argmax(-1)[:, 7:])


def test_same_seed_same_images_and_another_seed_others() -> None:
    model, nothing = random_model(), torch.empty(4, 0, dtype=torch.long)
    assert torch.equal(sample(model, nothing, seed=5), sample(model, nothing, seed=5))
    assert not torch.equal(sample(model, nothing, seed=5), sample(model, nothing, seed=6))


def test_samples_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(40_000, 4)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def shares(**settings: float) -> torch.Tensor:
        chosen = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
        return torch.bincount(choose(logits, uniform, **chosen), minlength=4) / len(logits)

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.01)
    torch.testing.assert_close(
        shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.01
    )
    torch.testing.assert_close(
        shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.01
    )
    torch.testing.assert_close(shares(top_p=0.2), torch.tensor([1.0, 0, 0, 0]), rtol=0, atol=0)
    cold = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(shares(temperature=0.5), cold / cold.sum(), rtol=0, atol=0.01)


@pytest.mark.parametrize("objective", ["autoregressive", "bert"])
def test_completion_keeps_what_is_known(objective: str) -> None:
    model = random_model(objective)
    originals = torch.randint(0, 11, (3, 36))
    sampled = complete(model, originals, 2, seed=1)
    assert torch.equal(sampled[:, :12], originals[:, :12])
    assert not torch.equal(sampled[:, 12:], originals[:, 12:])
    assert sampled.min() >= 0
    assert sampled.max() < 11
    assert torch.equal(sampled, complete(model, originals, 2, seed=1))


def test_unknown_pixels_do_not_influence_completions() -> None:
    model = random_model("bert")
    originals = torch.randint(0, 11, (2, 36))
    changed = originals.clone()
    known = torch.rand(36, generator=torch.Generator().manual_seed(0)) < 0.4
    changed[:, ~known] = (changed[:, ~known] + 1) % 11
    filled = complete(model, originals, known, rounds=5)
    assert torch.equal(filled, complete(model, changed, known, rounds=5))
    assert torch.equal(filled[:, known], originals[:, known])


def test_one_greedy_round_is_one_forward_pass() -> None:
    model = random_model("bert")
    originals, known = torch.randint(0, 11, (2, 36)), torch.arange(36) < 20
    filled = complete(model, originals, known, rounds=1, temperature=0, precision="fp32")
    expected = model(originals, ~known.expand(2, 36)).argmax(-1)
    assert torch.equal(filled[:, 20:], expected[:, 20:])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
        ({"rounds": 0}, "round"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sample(random_model(), torch.empty(1, 0, dtype=torch.long), **settings)


def test_objectives_and_sizes_must_fit() -> None:
    with pytest.raises(InputError, match="trained as 'autoregressive'; this one is 'bert'"):
        sample(random_model("bert"), torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match=r"0\.\.6"):
        complete(random_model(), torch.zeros(1, 36, dtype=torch.long), 7)
    with pytest.raises(InputError, match="longer than an image"):
        sample(random_model(), torch.zeros(1, 37, dtype=torch.long))
    with pytest.raises(InputError, match="do not fit a model of 36"):
        complete(
            random_model(), torch.zeros(1, 16, dtype=torch.long), torch.ones(16, dtype=torch.bool)
        )
