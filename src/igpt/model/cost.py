"""Parameters, floating-point operations (FLOPs) and batches of a model, from its configuration.

D width, n pixels of an image.
"""

import numpy as np
from numpy.typing import NDArray

from igpt.model.config import ModelConfig


def block_parameters(config: ModelConfig) -> int:
    """Return the parameters of one block: matrices (12 D^2), biases if there are any, two gains.

    The two scalars of a value residual, which the first block does not have, are not included.
    """
    width = config.n_embd
    return 12 * width**2 + (9 * width if config.bias else 0) + 2 * width


def head_parameters(config: ModelConfig) -> int:
    """Return the parameters of the output matrix."""
    return config.n_colors * config.n_embd


def root_parameters(config: ModelConfig) -> int:
    """Return the parameters outside the blocks: embeddings, the final gain, and the heads."""
    classes = len(config.class_names or ())
    positions = config.n_pixels if config.positions == "learned" else 0
    return config.n_embd * (config.n_inputs + positions + 1 + config.n_colors + classes)


def count_parameters(config: ModelConfig) -> int:
    """Return the parameters of a model, without building it."""
    mixes = 2 * (config.n_layer - 1) if config.value_residual else 0
    return config.n_layer * block_parameters(config) + mixes + root_parameters(config)


def inference_batch_size(config: ModelConfig) -> int:
    """Return a batch size that keeps a processor busy without a backward pass: 64 at 32 px."""
    return max(1, 2**16 // config.n_pixels)


def batches_of(positions: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Return the indices of the images of each batch.

    A batch has the images at `size` neighbouring positions of a selection, of which some may not
    decode. So it is the same one, and has results that are equal to the last digit, in every range
    of the selection that begins at a multiple of `size`.

    Args:
        positions: of the images in the selection, ascending.
    """
    if not len(positions):
        return []
    cuts = np.flatnonzero(np.diff(positions // size)) + 1
    return np.split(np.arange(len(positions)), cuts)


def cache_bytes(config: ModelConfig, number: int) -> int:
    """Return the bytes of an image's keys and values in all layers, at `number` bytes each."""
    return 2 * config.n_layer * config.n_pixels * config.n_embd * number


def attended_pairs(config: ModelConfig) -> int:
    """Return the pairs of positions that attend: n (n + 1) / 2 if causal, otherwise n^2."""
    n = config.n_pixels
    return n * (n + 1) // 2 if config.trained_as.causal else n**2


def block_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one block for one image, forward: two per multiply-add.

    Counted are the products with weights at every position, and attention's two (queries with keys,
    weights with values) over the pairs that must be computed: under a causal mask half of them,
    even if a kernel computes all. Norms, softmax, RoPE and the activation are not counted.
    """
    width = config.n_embd
    return 2 * (config.n_pixels * 12 * width**2 + 2 * attended_pairs(config) * width)


def forward_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one image, forward: those of the blocks and of the heads.

    A model with classes is counted as in fine-tuning with the joint loss: the class head once per
    image, and the output matrix. Embedding look-ups are not counted.
    """
    heads = 2 * config.n_embd * (config.n_pixels * config.n_colors + len(config.class_names or ()))
    return config.n_layer * block_flops(config) + heads


def training_flops(config: ModelConfig) -> int:
    """Return the FLOPs of one image, forward and backward: three times `forward_flops`.

    Every product has two in the backward pass, one for the gradient of each factor. These are the
    model's FLOPs, from which MFU is computed (Chowdhery et al. 2022, arXiv 2204.02311, appendix B):
    what activation checkpointing or a fused kernel computes again is not counted.
    """
    return 3 * forward_flops(config)
