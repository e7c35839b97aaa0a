"""Export of models to ONNX, for programs without PyTorch.

    step.onnx       one step of generation with a cache of keys and values (causal models)
    forward.onnx    the logits of masked pixels (models with masks)
    features.onnx   the features of all layers, averaged over positions, and the class logits
    weights.bin     the weights, which the other files share
    palette.npy     the palette, if the model has one
    export.json     inputs, outputs, start token, versions

The graphs consist of standard operators of opset 24. B images, T positions of a step, S positions
of the cache, n pixels, R resolution, D width, H heads, K head width, V colours, L layers, C
classes.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igpt import __version__
from igpt.data.images.palette import OPAQUE, Palette
from igpt.errors import InputError
from igpt.files import atomic_folder, write_json
from igpt.model.config import ModelConfig
from igpt.model.norm import NORM_EPS
from igpt.model.objectives import Autoregressive, Bert
from igpt.model.transformer import SLOPE, Block, ImageGPT
from igpt.model.variants import rope_table

if TYPE_CHECKING:
    import onnx

FORMAT, VERSION = "igpt-onnx", 1
STEP, FORWARD, FEATURES = "step.onnx", "forward.onnx", "features.onnx"
INT8 = "step-int8.onnx"
WEIGHTS, PALETTE, DESCRIPTION = "weights.bin", "palette.npy", "export.json"
OPSET = 24  # the first one with TensorScatter, and with caches of fixed size in Attention
_IR_VERSION = 10  # older runtimes refuse newer ones, and nothing here needs them
_ALIGNMENT = 4096  # bytes: a page of memory, so that runtimes can map the weights
_TIE = 1e-9  # squared 8-bit levels: smaller differences between distances are rounding

Attend = Callable[[int, str, str, str], str]  # (layer, queries, keys, values) -> [B, H, T, K]


@torch.no_grad()
def export_onnx(model: ImageGPT, folder: Path, *, int8: bool = False) -> None:
    """Write a model as ONNX files, atomically; see the names above.

    Args:
        folder: is created.
        int8: also write step-int8.onnx, whose matrix products use 8-bit integers.

    Raises:
        InputError: the folder exists, onnx is not installed, or the model's objective is another
            one than igpt's own and embeds its input differently; with `int8`, the model does not
            generate step by step.
    """
    require_new_export(folder)
    objective = model.config.trained_as
    if type(objective).embed not in (Autoregressive.embed, Bert.embed):
        raise InputError(
            f"the input of a model trained as {objective.name!r} cannot be exported; only those "
            f"of {Autoregressive.name!r} and {Bert.name!r} can"
        )
    if int8:
        objective.require("causal", "a step in int8")
    with atomic_folder(folder) as temporary:
        with (temporary / WEIGHTS).open("wb") as file:
            weights = _Weights(file)
            graphs = {FEATURES: _features(model, weights)}
            if objective.causal:
                graphs[STEP] = _step(model, weights)
            if objective.masked:
                graphs[FORWARD] = _forward(model, weights)
        for name, graph in graphs.items():
            (temporary / name).write_bytes(graph.SerializeToString())
        if int8:
            quantize_step(temporary)
        if model.palette is not None:
            model.palette.save(temporary / PALETTE)
        write_json(temporary / DESCRIPTION, _description(model, graphs, int8))


def require_new_export(folder: Path) -> None:
    """Check that an export can be written to a folder, before a model is loaded.

    Raises:
        InputError: the folder exists, or onnx or onnxruntime is not installed.
    """
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        raise InputError("an export needs onnx and onnxruntime: pip install 'igpt[onnx]'")
    if folder.exists():
        raise InputError(f"{folder} exists already; remove it or choose another folder")


def quantize_step(folder: Path) -> Path:
    """Write step-int8.onnx next to step.onnx, and return its path.

    Weights are integers of 7 bits, stored in 8, with a scale per output; the inputs of products are
    quantized when they are computed. The cache, norms and attention remain float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / INT8
    logging.disable(logging.WARNING)  # advice to preprocess graphs, of which these need nothing
    try:
        quantize_dynamic(
            folder / STEP,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Processors without VNNI add pairs of products in 16 bits, which 8 bits would overflow.
            reduce_range=True,
            use_external_data_format=True,
        )
    finally:
        logging.disable(logging.NOTSET)
    # onnx makes the file of the weights readable to its owner alone.
    shutil.copymode(folder / STEP, folder / f"{INT8}.data")
    return target


def _description(
    model: ImageGPT, graphs: Mapping[str, "onnx.ModelProto"], int8: bool
) -> dict[str, Any]:
    """Return the contents of export.json."""
    config = model.config
    files = {name: _signature(graph) for name, graph in graphs.items()}
    if int8:
        files[INT8] = files[STEP]
    return {
        "format": FORMAT,
        "version": VERSION,
        "igpt": __version__,
        "opset": OPSET,
        "objective": config.objective,
        "resolution": config.resolution,
        "n_colors": config.n_colors,
        "start_token": config.n_colors if config.trained_as.causal else None,
        **_classes(config),
        "class_names": config.class_names,
        "palette": None if model.palette is None else model.palette.fingerprint,
        "letters": {
            "B": "images",
            "T": "positions of a step",
            "S": f"positions of the cache: all up to the last of a step, at most {config.n_pixels}",
        },
        "files": files,
    }


def _classes(config: ModelConfig) -> dict[str, Any]:
    """Return the start token of each class of a class-conditional model, by name."""
    if config.conditions is None:
        return {}
    first = config.n_colors + 1
    names = enumerate(config.conditions, first)
    return {"start_tokens_of_classes": {name: token for token, name in names}}


def _signature(graph: "onnx.ModelProto") -> dict[str, dict[str, Any]]:
    """Return the types, shapes and descriptions of a graph's inputs and outputs."""
    import onnx

    def described(value: "onnx.ValueInfoProto") -> dict[str, Any]:
        tensor = value.type.tensor_type
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        return {"type": str(kind), "shape": shape, "is": value.doc_string}

    return {
        "inputs": {value.name: described(value) for value in graph.graph.input},
        "outputs": {value.name: described(value) for value in graph.graph.output},
    }


class _Weights:
    """The file of weights; each weight is written once, whichever graphs use it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.written: dict[str, onnx.TensorProto] = {}

    def tensor(self, name: str, value: Tensor) -> "onnx.TensorProto":
        """Return a reference to a weight, which is written if it is not there yet."""
        import onnx

        if name not in self.written:
            array = value.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False)
            self.file.write(bytes(-self.file.tell() % _ALIGNMENT))
            place = {"location": WEIGHTS, "offset": self.file.tell(), "length": array.nbytes}
            self.file.write(array.data)
            tensor = onnx.TensorProto(name=name, dims=array.shape)
            tensor.data_type = onnx.TensorProto.FLOAT
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, entry in place.items():
                tensor.external_data.add(key=key, value=str(entry))
            self.written[name] = tensor
        return self.written[name]


class _Graph:
    """A graph under construction. Values are known by their names."""

    def __init__(self, weights: _Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, kind: str, shape: Sequence[int | str], what: str) -> str:
        """Declare an input, and return its name."""
        self.inputs.append(_value(name, kind, shape, what))
        return name

    def output(self, name: str, kind: str, shape: Sequence[int | str], what: str) -> str:
        """Declare an output, and return its name."""
        self.outputs.append(_value(name, kind, shape, what))
        return name

    def add(self, operator: str, *inputs: str, into: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, and return the output's name."""
        import onnx

        name = into or f"v{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [name], **attributes))
        return name

    def split(self, x: str, parts: int) -> list[str]:
        """Return equal parts of the last of three dimensions."""
        import onnx

        names = [f"{x}.{part}" for part in range(parts)]
        node = onnx.helper.make_node("Split", [x], names, axis=2, num_outputs=parts)
        self.nodes.append(node)
        return names

    def constant(self, value: NDArray[Any]) -> str:
        """Return the name of a small constant."""
        import onnx

        name = f"c{len(self.initializers)}"
        self.initializers[name] = onnx.numpy_helper.from_array(value, name)
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a constant vector of integers."""
        return self.constant(np.array(values, dtype=np.int64))

    def weight(self, name: str, value: Tensor) -> str:
        """Return the name of a weight."""
        self.initializers[name] = self.weights.tensor(name, value)
        return name

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """Return x W' + b for the weight W [out, in]; W is stored transposed."""
        y = self.add("MatMul", x, self.weight(f"{name}.weight", weight.t()))
        return y if bias is None else self.add("Add", y, self.weight(f"{name}.bias", bias))

    def norm(self, x: str, width: int) -> str:
        """Return the RMS norm of x, without a gain."""
        ones = self.weight("ones", torch.ones(width))
        return self.add("RMSNormalization", x, ones, axis=-1, epsilon=NORM_EPS)

    def model(self, name: str, metadata: Mapping[str, str]) -> "onnx.ModelProto":
        """Return the finished model.

        Args:
            metadata: is stored in the file.
        """
        import onnx

        graph = onnx.helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, list(self.initializers.values())
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
            producer_name="igpt",
            producer_version=__version__,
        )
        onnx.helper.set_model_props(model, dict(metadata))
        return model


def _value(name: str, kind: str, shape: Sequence[int | str], what: str) -> "onnx.ValueInfoProto":
    import onnx

    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    return onnx.helper.make_tensor_value_info(name, number, shape, doc_string=what)


def _metadata(model: ImageGPT) -> dict[str, str]:
    """Return what the files say about the model: JSON values by name."""
    config = model.config
    known: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "objective": config.objective,
        "resolution": config.resolution,
        "n_colors": config.n_colors,
    }
    if config.trained_as.causal:
        known["start_token"] = config.n_colors
    known |= _classes(config)
    if model.palette is not None:
        known["palette"] = model.palette.colors.tolist()  # 8-bit RGB, or RGBA
        known["palette_fingerprint"] = model.palette.fingerprint
    if config.class_names is not None:
        known["class_names"] = config.class_names
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()
    }


def _step(model: ImageGPT, weights: _Weights) -> "onnx.ModelProto":
    """Return the graph of a step of generation."""
    config, graph = model.config, _Graph(weights)
    heads, width = config.n_head, config.n_embd // config.n_head
    graph.input(
        "tokens",
        "int64",
        ["B", "T"],
        f"the start token ({config.n_colors}) or the colour of the pixel before, at each position",
    )
    graph.input("position", "int64", ["B"], "of the first token: that many are in the cache")
    graph.output(
        "logits", "float32", ["B", "T", config.n_colors], "of the colour of the pixel at a position"
    )
    length = graph.add("Shape", "tokens", start=1, end=2)  # [1]
    end = graph.add("Add", "position", length)  # [B]
    zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
    offsets = graph.add("Range", zero, graph.add("Squeeze", length), one)  # [T]
    first = graph.add("Unsqueeze", "position", graph.integers(1))
    positions = graph.add("Add", first, offsets)  # [B, T]

    def attend(layer: int, q: str, k: str, v: str) -> str:
        shape: list[int | str] = ["B", heads, "S", width]
        caches = []
        for name, new in (("key", k), ("value", v)):
            what = f"{name}s of layer {layer}"
            past = graph.input(f"past.{layer}.{name}", "float32", shape, what)
            present = graph.output(
                f"present.{layer}.{name}",
                "float32",
                shape,
                f"{what}, with those of the step; may be in the memory of the input",
            )
            graph.add("TensorScatter", past, new, "position", into=present, axis=2)
            caches.append(present)
        return graph.add("Attention", q, *caches, "", "", "", end, is_causal=1)

    x = _add_positions(graph, model, _embed(graph, model, "tokens"), positions)
    *_, last = _normalized(graph, model, x, positions, attend)
    _logits(graph, model, last)
    return graph.model("igpt_step", _metadata(model))


def _forward(model: ImageGPT, weights: _Weights) -> "onnx.ModelProto":
    """Return the graph of the logits of masked pixels."""
    config, graph = model.config, _Graph(weights)
    n, colors = config.n_pixels, config.n_colors
    graph.input("tokens", "int64", ["B", n], "the colours; at masked pixels, any")
    graph.input("mask", "bool", ["B", n], "true where a pixel is masked")
    graph.output("logits", "float32", ["B", n, colors], "of the colour of each pixel")
    hidden = graph.add("Unsqueeze", "mask", graph.integers(2))
    zero = graph.constant(np.array(0, dtype=np.float32))
    x = graph.add("Where", hidden, zero, _embed(graph, model, "tokens"))
    positions = _all_positions(graph, model)
    x = _add_positions(graph, model, x, positions)
    *_, last = _normalized(graph, model, x, positions, _attention(graph, model))
    _logits(graph, model, last)
    return graph.model("igpt_forward", _metadata(model))


def _features(model: ImageGPT, weights: _Weights) -> "onnx.ModelProto":
    """Return the graph of the features of all layers, averaged over positions."""
    config, graph = model.config, _Graph(weights)
    n, side, layers, width = config.n_pixels, config.resolution, config.n_layer, config.n_embd
    if model.palette is None:
        graph.input("tokens", "int64", ["B", n], "the colours in raster order")
    else:
        transparent = model.palette.transparent
        channels, kind = (4, "RGBA images") if transparent else (3, "RGB images")
        graph.input("pixels", "uint8", ["B", side, side, channels], kind)
        _nearest_colors(graph, model.palette, n)
        graph.output("tokens", "int64", ["B", n], "the nearest colours in raster order")
    graph.output(
        "features",
        "float32",
        ["B", layers + 1, width],
        "of every layer: the normalized input of its attention; the last one is the final "
        "norm's output",
    )
    inputs = "tokens"
    if config.trained_as.causal:  # the start token, and all pixels except the last one
        ends = [graph.integers(number) for number in (0, n - 1, 1)]
        before = graph.add("Slice", "tokens", *ends)
        start = _for_all_images(graph, np.array([[config.n_colors]]))
        inputs = graph.add("Concat", start, before, axis=1)
    positions = _all_positions(graph, model)
    x = _add_positions(graph, model, _embed(graph, model, inputs), positions)
    axis = graph.integers(1)
    means = [
        graph.add("ReduceMean", normal, axis, keepdims=1)
        for normal in _normalized(graph, model, x, positions, _attention(graph, model))
    ]
    gains: list[Tensor] = [*(block.ln_1.weight for block in _blocks(model)), model.ln_f.weight]
    graph.add(
        "Mul",
        graph.add("Concat", *means, axis=1),
        graph.weight("gains", torch.stack(gains)),
        into="features",
    )
    if config.class_names is not None:
        classes = len(config.class_names)
        graph.output("class_logits", "float32", ["B", classes], "of the classes")
        weight = graph.weight("score.weight", (model.score.weight * model.ln_f.weight).t())
        graph.add("MatMul", graph.add("Squeeze", means[-1], axis), weight, into="class_logits")
    return graph.model("igpt_features", _metadata(model))


def _nearest_colors(graph: _Graph, palette: Palette, n: int) -> None:
    """Add the tokens of pixels: uint8 [B, R, R, C] -> [B, n].

    As in `Palette.transform`, a token is the exactly nearest colour; of equally near ones, the
    lowest. Distances are in float64, because float32 is too coarse for this.
    """
    import onnx

    kinds = onnx.TensorProto
    points = (palette.opaque_centers.astype(np.float64) + 1) * 127.5
    channels = palette.colors.shape[1]
    pixels = graph.add("Reshape", "pixels", graph.integers(0, n, channels))
    pixels = graph.add("Cast", pixels, to=kinds.DOUBLE)
    alpha = ""
    if palette.transparent:
        zero, three, four, last = (graph.integers(number) for number in (0, 3, 4, 2))
        alpha = graph.add("Squeeze", graph.add("Slice", pixels, three, four, last), last)  # [B, n]
        pixels = graph.add("Slice", pixels, zero, three, last)
    product = graph.add("MatMul", pixels, graph.constant(np.ascontiguousarray(-2 * points.T)))
    # Squared, minus |pixel|^2.
    distance = graph.add("Add", product, graph.constant((points**2).sum(-1)))  # [B, n, V]
    least = graph.add("ReduceMin", distance, graph.integers(-1), keepdims=1)
    least = graph.add("Add", least, graph.constant(np.array(_TIE)))
    nearest = graph.add("Cast", graph.add("LessOrEqual", distance, least), to=kinds.UINT8)
    if not palette.transparent:
        graph.add("ArgMax", nearest, into="tokens", axis=-1, keepdims=0)
        return
    colors = graph.add("ArgMax", nearest, axis=-1, keepdims=0)
    hidden = graph.add("Less", alpha, graph.constant(np.array(float(OPAQUE))))
    graph.add("Where", hidden, graph.constant(np.array(len(palette) - 1)), colors, into="tokens")


def _blocks(model: ImageGPT) -> list[Block]:
    return [block for block in model.h if isinstance(block, Block)]


def _for_all_images(graph: _Graph, row: NDArray[np.int64]) -> str:
    """Return a row [1, T] repeated for all images whose tokens are given: [B, T]."""
    images = graph.add("Shape", "tokens", start=0, end=1)
    shape = graph.add("Concat", images, graph.integers(1), axis=0)
    return graph.add("Expand", graph.constant(row), shape)


def _all_positions(graph: _Graph, model: ImageGPT) -> str:
    """Return the positions 0 .. n-1: [B, n]."""
    return _for_all_images(graph, np.arange(model.config.n_pixels)[None])


def _embed(graph: _Graph, model: ImageGPT, inputs: str) -> str:
    """Return embeddings without positions: [B, T] -> [B, T, D]."""
    return graph.add("Gather", graph.weight("wte", model.wte.weight), inputs)


def _add_positions(graph: _Graph, model: ImageGPT, x: str, positions: str) -> str:
    """Add learned embeddings of positions [B, T] to x [B, T, D], if the model has them."""
    if model.config.positions != "learned":
        return x
    table = graph.weight("wpe", model.wpe.weight)
    return graph.add("Add", x, graph.add("Gather", table, positions))


def _attention(graph: _Graph, model: ImageGPT) -> Attend:
    """Return the attention within whole images."""
    causal = int(model.config.trained_as.causal)
    return lambda layer, q, k, v: graph.add("Attention", q, k, v, is_causal=causal)


def _normalized(
    graph: _Graph, model: ImageGPT, x: str, positions: str, attend: Attend
) -> Iterator[str]:
    """Yield the norms of the blocks' inputs, then the final one, without gains: [B, T, D] each.

    The gains are folded into the weights of the products that follow, as are the activation's slope
    and the share of a layer's own values in a value residual.
    """
    config = model.config
    width, heads = config.n_embd, config.n_head
    apart, together = graph.integers(0, 0, heads, width // heads), graph.integers(0, 0, width)
    rotary = config.positions == "rotary"
    tables = _rotations(graph, model) if rotary else ()
    first = None
    for layer, block in enumerate(_blocks(model)):
        name = f"h.{layer}"
        normal = graph.norm(x, width)
        yield normal
        qkv = graph.linear(f"{name}.attn.c_attn", normal, *_projections(block))
        by_head = [graph.add("Reshape", part, apart) for part in graph.split(qkv, 3)]
        q, k, v = (graph.add("Transpose", part, perm=(0, 2, 1, 3)) for part in by_head)
        if rotary:
            q, k = (graph.add("RotaryEmbedding", part, *tables, positions) for part in (q, k))
        if first is not None:
            share = graph.weight(f"{name}.attn.mix", block.attn.mix[1])
            v = graph.add("Add", v, graph.add("Mul", first, share))
        elif config.value_residual:
            first = v
        read = graph.add("Transpose", attend(layer, q, k, v), perm=(0, 2, 1, 3))
        read = graph.add("Reshape", read, together)
        out = graph.linear(
            f"{name}.attn.c_proj", read, block.attn.c_proj.weight, block.attn.c_proj.bias
        )
        x = graph.add("Add", x, out)
        inner, outer = block.mlp.c_fc, block.mlp.c_proj
        y = graph.linear(
            f"{name}.mlp.c_fc",
            graph.norm(x, width),
            inner.weight * block.ln_2.weight * SLOPE,
            None if inner.bias is None else inner.bias * SLOPE,
        )
        # x sigmoid(s x) = (s x) sigmoid(s x) / s
        y = graph.add("Mul", y, graph.add("Sigmoid", y))
        y = graph.linear(f"{name}.mlp.c_proj", y, outer.weight / SLOPE, outer.bias)
        x = graph.add("Add", x, y)
    yield graph.norm(x, width)


def _logits(graph: _Graph, model: ImageGPT, normal: str) -> None:
    """Add the logits of the colours: [B, T, D] -> [B, T, V]."""
    weight = (model.lm_head.weight * model.ln_f.weight).t()
    graph.add("MatMul", normal, graph.weight("lm_head.weight", weight), into="logits")


def _projections(block: Block) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of queries, keys and values, as the graphs need them.

    The gain of the norm is folded in, and the share of a layer's own values in a value residual.
    For RoPE the numbers of a head are reordered: igpt rotates pairs within each half of a head (for
    row and column), the operator pairs the first half of a head with the second half.
    """
    attn = block.attn
    config = attn.config
    rows = torch.arange(3 * config.n_embd).view(3, config.n_head, -1)
    if config.positions == "rotary":
        order = torch.arange(rows.shape[-1]).view(2, 2, -1).transpose(0, 1).flatten()
        rows = torch.cat([rows[:2, :, order], rows[2:]])
    scale = torch.ones(3, config.n_embd, device=attn.c_attn.weight.device)
    if hasattr(attn, "mix"):
        scale[2] = attn.mix[0].detach()
    index, scale = rows.flatten(), scale.flatten()
    bias = None if attn.c_attn.bias is None else (attn.c_attn.bias * scale)[index]
    return (attn.c_attn.weight * block.ln_1.weight * scale[:, None])[index], bias


def _rotations(graph: _Graph, model: ImageGPT) -> tuple[str, str]:
    """Return the cosines and sines of RoPE, each [n, K/2], in the order of `_projections`."""
    config = model.config
    n, width = config.n_pixels, config.n_embd // config.n_head
    table = rope_table(torch.arange(n), width, config.resolution).float()  # [n, 2, K]
    # [n, 2, axes, of a pair, K/4]: the sines of second numbers are positive.
    cos, sin = table.view(n, 2, 2, 2, width // 4)[:, :, :, 1].flatten(2).unbind(1)
    return graph.weight("rope.cos", cos), graph.weight("rope.sin", sin)
