"""What a model costs, known from its configuration alone: parameters and floating-point operations.

T places, D width, V colours, L layers, C classes; n = T places of an image.
"""

from igpt.model.config import ModelConfig


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block: four matrices of 12 D^2 in all, their biases if there are any, two gains.

    The two scalars of a value residual are left to `count_parameters`: the first block has none.
    """
    width = config.n_embd
    return 12 * width**2 + (9 * width if config.bias else 0) + 2 * width


def head_parameters(config: ModelConfig) -> int:
    """Return the parameters of the matrix that colours are predicted by."""
    return config.n_colors * config.n_embd


def root_parameters(config: ModelConfig) -> int:
    """Parameters outside the blocks: embeddings of colours, start and places, the final gain, and the heads."""
    classes, places = (
        len(config.class_names or ()),
        config.n_pixels if config.positions == "learned" else 0,
    )
    return config.n_embd * (config.n_colors + 1 + places + 1 + config.n_colors + classes)


def count_parameters(config: ModelConfig) -> int:
    """Parameters of a model; ImageGPT itself is not built for it."""
    mixes = 2 * (config.n_layer - 1) if config.value_residual else 0
    return config.n_layer * block_parameters(config) + mixes + root_parameters(config)


def inference_batch_size(config: ModelConfig) -> int:
    """Images whose places fill a processor when nothing is kept for a backward pass: 64 at 32 px."""
    return max(1, 2**16 // config.n_pixels)


def cache_bytes(config: ModelConfig, number: int) -> int:
    """Bytes of an image's keys and values in all layers, of numbers of so many bytes."""
    return 2 * config.n_layer * config.n_pixels * config.n_embd * number


def attended_pairs(config: ModelConfig) -> int:
    """Pairs of places that attend to each other in an image: n (n + 1) / 2 under a causal mask, n^2 without."""
    n = config.n_pixels
    return n * (n + 1) // 2 if config.trained_as.causal else n**2


def block_flops(config: ModelConfig) -> int:
    """Floating-point operations of one block and one image, forward: two a multiply-add of the matrix products.

    Counted are the products of the weights at every place, and attention's two (queries with keys,
    weights with values)
    over the pairs that must be computed: under the causal mask half of them, whatever a kernel does
        with the other
    half. Norms, softmax, rotary turns and the activation are not counted.
    """
    width = config.n_embd
    return 2 * (config.n_pixels * 12 * width**2 + 2 * attended_pairs(config) * width)


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of one image, forward: those of the blocks and of the heads.

    A model with classes is counted as fine-tuning by the joint loss uses it: its class head, once
    an image, and the output matrix. Looking up embeddings is not counted.
    """
    heads = 2 * config.n_embd * (config.n_pixels * config.n_colors + len(config.class_names or ()))
    return config.n_layer * block_flops(config) + heads


def training_flops(config: ModelConfig) -> int:
    """Floating-point operations of one image, forward and backward: three times `forward_flops`.

    Every product has two in the backward pass, one for each factor's gradient. These are the
    model's operations, as in the field's model FLOPs utilisation (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B): what activation checkpointing or a fused attention kernel computes a
    second time is not counted.
    """
    return 3 * forward_flops(config)
