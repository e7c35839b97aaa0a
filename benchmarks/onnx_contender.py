"""Generation with an exported step under ONNX Runtime, the contender of generate.py.

    python benchmarks/onnx_contender.py                      # seconds per step of iGPT-S
    python benchmarks/onnx_contender.py --batches 1 --steps 50

It measures steps in the middle of images (position n / 2). Kinds take turns. Fused kinds replace
the standard operators of attention by ONNX Runtime's own GroupQueryAttention.

    contender = OnnxContender(model, "int8 fused")
    seconds, tokens = contender.generate(batch=16)           # [16, n], sampled

B images, n pixels, H heads, S positions of the cache, K head width, V colours.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import common
import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from igpt.model.config import ModelConfig
from igpt.model.onnx_export import INT8, STEP, export_onnx
from igpt.model.transformer import ImageGPT
from igpt.training.presets import preset

BUCKET = 64  # positions by which the cache grows: attention reads all positions that it has
Kind = Literal["fp32", "int8", "fp32 fused", "int8 fused"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Generated(NamedTuple):
    """Wall seconds, without those for export and session, and tokens [B, n]."""

    seconds: float
    tokens: NDArray[np.int64]


class OnnxContender:
    """A model's exported step in a session of ONNX Runtime.

    Args:
        kind: of the matrix products, and whether attention is one operator of ONNX Runtime: this
            needs a head width divisible by 8, and no variants.
        threads: of ONNX Runtime; all cores by default.
    """

    def __init__(self, model: ImageGPT, kind: Kind = "fp32", threads: int | None = None) -> None:
        self.config = model.config
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        with tempfile.TemporaryDirectory() as folder:
            int8 = kind.startswith("int8")
            export_onnx(model, Path(folder) / "model", int8=int8)
            file = Path(folder) / "model" / (INT8 if int8 else STEP)
            if kind.endswith("fused"):
                assert model.config.faithful, "variants change what attention reads"
                fuse_attention(file, model.config.n_head)
            providers = ["CPUExecutionProvider"]
            self.session = ort.InferenceSession(file, options, providers=providers)

    def generate(self, batch: int, pixels: int | None = None, seed: int = 0) -> Generated:
        """Generate the first pixels (all by default) of images, sampled at temperature 1."""
        pixels = pixels or self.config.n_pixels
        uniform = np.random.default_rng(seed).random((pixels, batch, 1), dtype=np.float32)
        tokens = np.empty((batch, pixels), dtype=np.int64)
        started = time.perf_counter()
        decoding = Decoding(self, batch)
        last = np.full(batch, self.config.n_colors)
        for position in range(pixels):
            last = tokens[:, position] = sample(decoding.step(last), uniform[position])
        return Generated(time.perf_counter() - started, tokens)


def fuse_attention(file: Path, heads: int) -> None:
    """Replace the operators of attention in a step's file by GroupQueryAttention.

    It divides queries, keys and values among heads itself, updates the cache, and reads only the
    positions that are filled.
    """
    model = onnx.load(file, load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    ends = [node.input[6] for node in model.graph.node if node.op_type == "Attention"]
    one = onnx.numpy_helper.from_array(np.array(1), "fused.one")
    model.graph.initializer.append(one)
    make, kind = onnx.helper.make_node, onnx.TensorProto.INT32
    lengths = [
        make("Sub", [ends[0], one.name], ["fused.last"]),
        make("Cast", ["fused.last"], ["fused.lengths"], to=kind),
        make("ReduceMax", [ends[0]], ["fused.end"], keepdims=0),
        make("Cast", ["fused.end"], ["fused.total"], to=kind),
    ]
    nodes: list[onnx.NodeProto] = []
    removed: set[str] = set()

    def undivided(value: str) -> str:
        """Return the value of which a value is the division among heads: Reshape, Transpose."""
        reshape = made[made[value].input[0]]
        removed.update((value, reshape.output[0]))
        return reshape.input[0]

    for node in model.graph.node:
        before = made.get(node.input[0]) if node.input else None
        if node.op_type == "Attention":
            updates = [made[name] for name in node.input[1:3]]
            new = [undivided(value) for value in (node.input[0], *(up.input[1] for up in updates))]
            past = [update.input[0] for update in updates]
            present = [update.output[0] for update in updates]
            removed.update(present)
            fused = make(
                "GroupQueryAttention",
                [*new, *past, "fused.lengths", "fused.total"],
                [f"{node.output[0]}.fused", *present],
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=heads,
            )
            nodes += [*lengths, fused]
            lengths = []
        elif before is not None and before.op_type == "Attention":
            removed.add(node.output[0])
        elif node.op_type == "Reshape" and _is_transposed_attention(before, made):
            nodes.append(make("Identity", [f"{before.input[0]}.fused"], [node.output[0]]))
        else:
            nodes.append(node)
    kept = [
        node
        for node in nodes
        if node.op_type == "GroupQueryAttention" or node.output[0] not in removed
    ]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, file)


def _is_transposed_attention(node: onnx.NodeProto | None, made: dict[str, onnx.NodeProto]) -> bool:
    above = made.get(node.input[0]) if node is not None and node.input else None
    return above is not None and above.op_type == "Attention"


class Decoding:
    """The state of a generation: the cache, and the memory that steps read and write.

    Nothing is copied in a step: inputs and outputs are bound to arrays, and the cache is updated in
    place.

    Args:
        position: of the first step; the cache before it is zero.
    """

    def __init__(self, contender: OnnxContender, batch: int, position: int = 0) -> None:
        config = contender.config
        self.session, self.n = contender.session, config.n_pixels
        self.shape = (batch, config.n_head, 0, config.n_embd // config.n_head)
        self.tokens = np.zeros((batch, 1), dtype=np.int64)
        self.position = np.full(batch, position)
        self.logits = np.empty((batch, 1, config.n_colors), dtype=np.float32)
        names = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("key", "value")]
        self.caches = {name: np.zeros(self.shape, dtype=np.float32) for name in names}
        self.size = 0
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("tokens", _shared(self.tokens))
        self.binding.bind_ortvalue_input("position", _shared(self.position))
        self.binding.bind_ortvalue_output("logits", _shared(self.logits))

    def step(self, last: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits [B, V] of the next pixel after a token [B]: a view of the memory."""
        if self.position[0] >= self.size:
            self._grow()
        self.tokens[:, 0] = last
        self.session.run_with_iobinding(self.binding)
        self.position += 1
        return self.logits[:, 0]

    def _grow(self) -> None:
        self.size = min(self.n, (int(self.position[0]) // BUCKET + 1) * BUCKET)
        batch, heads, _, width = self.shape
        for name, old in self.caches.items():
            new = np.zeros((batch, heads, self.size, width), dtype=np.float32)
            new[:, :, : old.shape[2]] = old
            self.caches[name] = new
            memory = _shared(new)
            self.binding.bind_ortvalue_input(f"past.{name}", memory)
            self.binding.bind_ortvalue_output(f"present.{name}", memory)


def _shared(array: NDArray[np.generic]) -> ort.OrtValue:
    """Return a value of ONNX Runtime in the memory of an array."""
    value = ort.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data, "the array was copied"
    return value


def sample(logits: NDArray[np.float32], uniform: NDArray[np.float32]) -> NDArray[np.int64]:
    """Sample colours by inverting their distribution: logits [B, V], uniform [B, 1] -> [B]."""
    cumulative = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(axis=1)


def main(
    model: str = "igpt-s",
    batches: tuple[int, ...] = (1, 16),
    steps: int = 200,
    threads: int | None = None,
    result: str = "onnx_contender",
) -> None:
    """Measure seconds per step.

    Args:
        model: preset.
        batches: images at a time.
        steps: of each kind and batch.
        threads: of ONNX Runtime; all cores by default.
        result: name of the JSON.
    """
    settings = {
        key: value for key, value in preset(model).items() if key in ModelConfig.model_fields
    }
    torch.manual_seed(0)
    ours = ImageGPT(ModelConfig.layered(settings))
    torch.nn.init.normal_(ours.lm_head.weight, std=0.2)
    contenders = {kind: OnnxContender(ours.eval(), kind, threads) for kind in KINDS}
    rows = []
    for batch in batches:
        middle = (ours.config.n_pixels - steps) // 2
        running = {kind: Decoding(one, batch, middle) for kind, one in contenders.items()}
        last = np.zeros(batch, dtype=np.int64)
        times: dict[str, list[float]] = {kind: [] for kind in running}
        for _ in range(steps):
            for kind, decoding in running.items():
                started = time.perf_counter()
                decoding.step(last)
                times[kind].append(time.perf_counter() - started)
        for kind, found in times.items():
            low, middle_time = np.percentile(found, [5, 50])
            rows.append({"batch": batch, "kind": kind, "median": middle_time, "fastest_5": low})
    common.show(
        f"{model}, ONNX Runtime {ort.__version__}, ms per step around position n / 2",
        ["batch, kind", "median", "5th percentile"],
        [
            [
                f"{row['batch']}, {row['kind']}",
                f"{row['median'] * 1e3:.1f}",
                f"{row['fastest_5'] * 1e3:.1f}",
            ]
            for row in rows
        ],
    )
    common.record(
        result, {"model": model, "steps": steps, "onnxruntime": ort.__version__, "rows": rows}
    )


if __name__ == "__main__":
    common.run(main)
