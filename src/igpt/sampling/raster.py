"""Sampling in raster order, several pixels per pass.

A pixel is a function of the pixels before it and of its noise (colors.py). A pass takes a window of
pixels of every image: the first one unknown, the others guessed. It computes the colour that the
model samples at each of them if the guesses before it are right. The colours up to the first wrong
guess, and the one in place of it, are final: they are those of a pass per pixel. The next window
starts after them. Its guesses are the other colours that this pass sampled (Jacobi iteration: Song
et al. 2020, arXiv 2002.03629; Wiggers and Hoogeboom 2020, arXiv 2002.09928).

With guidance, every image has two rows of a pass and of the cache: one that begins with the start
token of its class, and one that begins with that of no class. Their pixels are the same.

B images, T pixels of a window, n pixels of an image, V colours.
"""

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from igpt.model.cost import cache_bytes, count_parameters
from igpt.model.transformer import ImageGPT
from igpt.sampling.colors import guided, gumbel_noise
from igpt.sampling.decoder import Decoder
from igpt.sampling.jobs import Job, PartialImages, require_finite

_SIZES = (1, 2, 4, 8, 16, 32, 64)  # of windows
_MOST_ROWS = 2**14  # of all windows, which bounds the memory of a pass
# Rows whose products take as long as reading the weights: on a CPU by precision, and on a GPU.
_FREE_ROWS = {"fp32": 20, "bf16": 48, "int8": 36}
_FREE_ROWS_GPU = 512
_DECAY = 0.95  # weight of earlier windows in averages, per pass
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
_BUCKET = 64  # positions by which the cache that a captured pass reads grows
_CAPTURE = threading.Lock()


@torch.inference_mode()
def generate_in_order(model: ImageGPT, job: Job) -> Iterator[PartialImages]:
    """Generate unknown pixels in raster order, each from all pixels before it.

    Known pixels after it have no influence on it.
    """
    if job.known.all():
        yield PartialImages(job.tokens, job.known)
        return
    windows = _Windows(model, job)
    shown = min(windows.starts) // job.stride
    while min(windows.starts) < windows.end:
        windows.advance()
        reached = min(windows.starts) // job.stride
        if reached > shown or min(windows.starts) == windows.end:
            shown = reached
            require_finite(windows.finite)
            yield PartialImages(windows.sequence[:, 1:].clone(), windows.known.clone())


class _Windows:
    """A batch of images with a window each, which moves on at its own speed.

    Attributes:
        copies: rows of a pass for each image.
        sequence: the start token and n pixels, [B, n + 1]; unknown pixels contain guesses.
        known: bool [B, n]; all pixels before a window are known.
        start: the first pixel of every window, [B].
        starts: the same numbers on the host.
        end: number of the last unknown pixel of all images, plus 1.
        finite: whether all logits were finite, those after wrong guesses included.
        cache_cost: of reading the whole cache once, in units of reading the weights once.
        row_cost: of a pixel in every window, in the same units.
        warm: sizes of windows for which a pass has run.
        captured: CUDA graphs by size and span.
    """

    def __init__(self, model: ImageGPT, job: Job) -> None:
        batch, _ = job.tokens.shape
        config = model.config
        self.copies = 1 if job.guidance == 1 else 2
        rows = self.copies * batch
        unknown = torch.nonzero(~job.known.all(0))[:, 0].tolist()  # in at least one image
        first, self.end = unknown[0], unknown[-1] + 1
        self.job, self.n_colors = job, config.n_colors
        self.sequence = torch.cat([job.starts[:, None], job.tokens.where(job.known, 0)], dim=1)
        self.known = job.known.clone()
        self.starts = [first] * batch
        self.start = torch.tensor(self.starts, device=model.device)
        self.finite = torch.ones((), dtype=torch.bool, device=model.device)
        self.decoder = Decoder(model, rows, job.precision)
        prefix = torch.arange(first, device=model.device).expand(batch, first)
        self.decoder.prefill(self._inputs(prefix))
        # Recent windows: their number, and the sums of their sizes and of the pixels accepted.
        self.recent_windows, self.recent_pixels, self.recent_accepted = 1.0, 16.0, 3.0
        weights = _BYTES[job.precision] * count_parameters(config)
        self.cache_cost: float = rows * cache_bytes(config, self.decoder.kind.itemsize) / weights
        on_cpu = model.device.type == "cpu"
        self.row_cost: float = rows / (_FREE_ROWS[job.precision] if on_cpu else _FREE_ROWS_GPU)
        self.warm: set[int] = set()
        self.captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def advance(self) -> None:
        """Run a pass: determine at least one more pixel of every unfinished image."""
        most = max(1, _MOST_ROWS // (self.copies * len(self.starts)))
        size = min(self.job.window or self._best_size(), most)
        # Near the end, a size that has been used before: every new one needs new kernels.
        left = self.end - min(self.starts)
        size = min(size, next((one for one in _SIZES if one >= left), size), self.end)
        span = min(max(self.starts) + size, self.end)
        if self.start.device.type == "cpu":
            self._pass(size, span)
        else:
            self._pass_on_gpu(size, min(-(-span // _BUCKET) * _BUCKET, self.known.shape[1]))
        before, self.starts = self.starts, self.start.tolist()
        if size > 1:
            moved = [
                new - old for old, new in zip(before, self.starts, strict=True) if old < self.end
            ]
            self.recent_windows = _DECAY * self.recent_windows + len(moved)
            self.recent_pixels = _DECAY * self.recent_pixels + len(moved) * size
            self.recent_accepted = _DECAY * self.recent_accepted + sum(moved)

    def _best_size(self) -> int:
        """Return the size of window that should determine most pixels per second.

        The pixels that a window of T determines grow as a power of T: a pixel is sampled in more
        passes before it is first in its window, so that larger windows have better guesses. The
        cost of a pass is estimated in units of reading the weights once.
        """
        power = math.log(self.recent_accepted / self.recent_windows) / math.log(
            self.recent_pixels / self.recent_windows
        )
        fixed: float = 1 + self.cache_cost * min(self.starts) / self.known.shape[1]

        def speed(size: int) -> float:
            return math.pow(size, power) / (fixed + self.row_cost * size)

        return max(_SIZES, key=speed)

    def _pass(self, size: int, span: int) -> None:
        """Sample the pixels of all windows, and move the windows to the first ones that may change.

        Args:
            size: pixels of a window.
            span: positions of the cache to read; above all pixels of the windows.
        """
        sequence, known, keys = self.sequence, self.known, self.job.keys
        offsets = torch.arange(size, device=sequence.device)
        # Near the end, a window also contains known pixels before its start.
        first = self.start.clamp(max=self.end - size)[:, None]
        pixels = first + offsets  # [B, T]
        # The input at a position is the pixel before it, and its output is the pixel itself.
        logits = self.decoder.logits(self._inputs(pixels), pixels.repeat(self.copies, 1), span)
        self.finite &= logits.isfinite().all()
        if self.copies == 2:
            given, without = logits.chunk(2)
            logits = guided(given, without, self.job.guidance)
        sampled = self.job.choose(logits, gumbel_noise(keys, pixels, self.n_colors))
        guessed = sequence.gather(1, pixels + 1)
        colors = torch.where(known.gather(1, pixels), guessed, sampled)
        sequence.scatter_(1, pixels + 1, colors)
        right = (colors == guessed)[:, :-1].cumprod(1).sum(1)  # guesses before the first wrong one
        self.start.copy_(first[:, 0] + right + 1)
        known |= torch.arange(known.shape[1], device=known.device) < self.start[:, None]
        # The pixels after the window have not been sampled yet. They are guessed from the logits of
        # the window's last pixel, with their own noise.
        after = (first + size + offsets).clamp(max=self.end - 1)
        guess = self.job.choose(logits[:, -1:], gumbel_noise(keys, after, self.n_colors))
        old = sequence.gather(1, after + 1)
        sequence.scatter_(1, after + 1, torch.where(known.gather(1, after), old, guess))

    def _inputs(self, positions: Tensor) -> Tensor:
        """Return what enters at positions [B, T]; with guidance, of both rows of an image: [2B, T].

        The second half has the start token of no class.
        """
        inputs = self.sequence.gather(1, positions)
        if self.copies == 1:
            return inputs
        return torch.cat([inputs, inputs.where(positions > 0, self.n_colors)])

    def _pass_on_gpu(self, size: int, span: int) -> None:
        """Run a pass as a CUDA graph, so that it does not wait for the host.

        The first pass of each size is not captured: it loads the kernels. Graphs run one after the
        other and leave nothing in their memory pool, so that they share one. Another thread may
        sample meanwhile, but only one may capture.
        """
        if size not in self.warm:
            self._pass(size, span)
            self.warm.add(size)
            return
        if (size, span) not in self.captured:
            pool = next(iter(self.captured.values())).pool() if self.captured else None
            graph = torch.cuda.CUDAGraph()
            with _CAPTURE, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._pass(size, span)
            self.captured[size, span] = graph
        self.captured[size, span].replay()
