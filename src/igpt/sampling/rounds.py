"""Sampling of masked pixels in rounds, the most certain ones first.

B images, n pixels of an image, V colours.
"""

import math
from collections.abc import Iterator

import torch

from igpt.model.precision import autocast
from igpt.model.transformer import ImageGPT
from igpt.sampling.colors import gumbel_noise
from igpt.sampling.jobs import Job, PartialImages, require_finite


@torch.inference_mode()
def generate_in_rounds(model: ImageGPT, job: Job) -> Iterator[PartialImages]:
    """Generate unknown pixels in rounds, the most certain ones first.

    Every round samples a colour for each unknown pixel and keeps the colours of highest
    probability. The number of unknown pixels falls along a quarter of a cosine (arXiv 2202.04200,
    section 3.2).
    """
    tokens, known = job.tokens, job.known
    if known.all():
        yield PartialImages(tokens, known)
        return
    n = tokens.shape[1]
    total = (~known).sum(1, keepdim=True)  # [B, 1]
    for index in range(job.rounds):
        pixels = torch.arange(n, device=tokens.device) + index * n  # other noise in every round
        noise = gumbel_noise(job.keys, pixels.expand(len(tokens), n), model.config.n_colors)
        last = index + 1 == job.rounds
        share = 0.0 if last else math.cos(math.pi / 2 * (index + 1) / job.rounds)
        with autocast(job.precision, tokens.device):
            logits = model(tokens.masked_fill(~known, 0), ~known)  # [B, n, V]
        require_finite(logits.isfinite())
        sampled = job.choose(logits, noise)
        confidence = logits.float().log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
        order = confidence.masked_fill(known, torch.inf).argsort(dim=1)  # least confident first
        ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        tokens = torch.where(known, tokens, sampled)
        known = known | (rank >= (total * share).long())
        yield PartialImages(tokens, known)
