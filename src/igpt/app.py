"""A web page for a trained model (Gradio): it completes, scores and draws images. Nothing leaves the machine.

n places, R resolution.
"""

import errno
import html
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from igpt.data.grids import image_grid
from igpt.data.views import Transform
from igpt.errors import InputError
from igpt.evaluation.likelihood import summary
from igpt.model.generate import complete
from igpt.model.objectives import place_losses
from igpt.model.transformer import ImageGPT
from igpt.pictures import palette_of, pictures

if TYPE_CHECKING:
    import gradio as gr

_UPLOAD = 20  # MB at most
_WAITING = 8  # requests at most in the queue; who comes then is told so
_HOUR = 3600  # seconds; older uploads and drawings are deleted from the disk
_SIDE = 256  # pixels on the screen that a picture gets at least
_POLL = 0.25  # seconds between two words on the progress
_STYLE = """
.pixels img { image-rendering: pixelated; }
.pixels .image-container:has(img), .pixels .grid-wrap { padding-top: 2.2rem; } /* labels lie beside the pixels */
.pixels .thumbnail-item, .pixels .thumbnail-item img { border-radius: 0; }
.pixels .thumbnail-item .caption-label { display: none; }
footer .divider { display: none; }
"""


def build(model: ImageGPT) -> "gr.Blocks":
    """The page, not yet served. Its endpoints: `complete`, `score`, `sample`; of a BERT model `complete` and `view`.

    Raises:
        InputError: the model has no palette, or gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise InputError("the web page needs gradio: pip install 'igpt[app]'")
    import gradio as gr

    palette_of(model)
    config, scored = model.config, model.config.objective == "autoregressive"
    pixels: dict[str, Any] = {"format": "png", "elem_classes": "pixels"}  # Gradio's own format changes colours

    def look(file: str | None) -> Any:
        if file is None:
            return (None, None, "") if scored else None
        with _told():
            tokens = _read(model, file)
        seen = _enlarge(pictures(model, tokens)[0])
        return (seen, *_score(model, tokens)) if scored else seen

    def completions(file: str | None, *settings: Any) -> Iterator[Any]:
        with _told():
            if file is None:
                raise InputError("choose an image first")
            yield from _draw(model, _read(model, file), *settings)

    def samples(*settings: Any) -> Iterator[Any]:
        with _told():
            yield from _draw(model, torch.zeros(1, config.n_places, dtype=torch.long), 0, *settings)

    def picture(label: str) -> Any:
        return gr.Image(label=label, interactive=False, buttons=["download"], min_width=130, **pixels)

    page = gr.Blocks(title="igpt", analytics_enabled=False, delete_cache=(_HOUR, _HOUR))
    with page:
        gr.Markdown(
            f"# Completing images\n{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million "
            f"parameters, trained to predict {'every pixel from those before it' if scored else 'hidden pixels'}, in "
            f"images of {config.resolution} by {config.resolution} pixels and {config.n_colors} colours. Choose an "
            "image: its middle square is brought to that size, and the model draws what is below the rows you keep."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                file = gr.File(label=f"Image, at most {_UPLOAD} MB", file_types=["image"], height=140)
                with gr.Row():
                    shown = [picture("Model's view"), picture("Loss")] if scored else [picture("Model's view")]
                if scored:
                    shown.append(gr.Markdown())
            with gr.Column(min_width=300):
                rows = gr.Slider(0, config.resolution, config.resolution // 2, step=1, label="Rows to keep")
                count = gr.Slider(1, 8, 4, step=1, label="Drawings")
                info = "1 draws as the model learned, 0 takes the likeliest colours."
                temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature", info=info)
                info = "The same seed and settings give the same drawing; further drawings take the seeds after it."
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**53, label="Seed", info=info)
                with gr.Row():
                    complete_button = gr.Button("Complete", variant="primary", min_width=80)
                    sample_button = gr.Button("Sample", min_width=80, visible=scored)
                    stop_button = gr.Button("Stop", min_width=80)
                words = gr.Markdown()
                gallery = gr.Gallery(label="Drawings", buttons=["download", "download_all"], **pixels)
        file.change(look, file, shown, api_name="score" if scored else "view", show_progress="hidden")
        # One drawing at a time, whoever asked for it; looking at an image need not wait for it.
        queue: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "show_progress_on": words}
        settings, drawn = [count, temperature, seed], [gallery, words]
        work: list[Any] = [
            complete_button.click(completions, [file, rows, *settings], drawn, api_name="complete", **queue)
        ]
        if scored:
            work.append(sample_button.click(samples, settings, drawn, api_name="sample", **queue))
        stopping = stop_button.click(None, cancels=work, api_visibility="private")
        stopping.then(lambda: "Stopped.", None, words, queue=False, api_visibility="private")
    page.queue(max_size=_WAITING)
    return page


def start(model: ImageGPT, host: str, port: int) -> "gr.Blocks":
    """Serves the page at host:port and returns; `close()` of what it returns ends it.

    Raises:
        InputError: the port is in use, nothing can listen at this address, or see `build`.
    """
    page = build(model)
    import gradio as gr

    try:  # Gradio would call every reason a lack of free ports
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            port = probe.getsockname()[1]  # of 0, any free one
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is in use; choose another with --port") from None
        raise InputError(f"the page cannot be served at {host}, port {port}: {error}") from None
    # Gradio asks its own server whether it is up; no proxy may stand between them.
    direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host, "localhost")
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    look = gr.themes.Default(primary_hue="blue", font=("system-ui", "sans-serif"))  # no font from elsewhere
    off = {"share": False, "ssr_mode": False, "run_history": False, "mcp_server": False, "enable_monitoring": False}
    options: dict[str, Any] = {**off, "footer_links": ["api"], "max_file_size": f"{_UPLOAD}mb", "css": _STYLE}
    options |= {"theme": look.set(block_info_text_color="*neutral_500"), "prevent_thread_lock": True, "quiet": True}
    page.launch(server_name=f"[{host}]" if ":" in host else host, server_port=port, **options)
    return page


def serve(model: ImageGPT, host: str, port: int) -> None:
    """Serves the page at host:port until Ctrl-C.

    Raises:
        InputError: see `start`.
    """
    page = start(model, host, port)
    print(f"{page.local_url} shows the page; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        page.close(verbose=False)


@contextmanager
def _told() -> Iterator[None]:
    """Shows a user's mistake on the page, which takes messages for HTML."""
    import gradio as gr

    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None


def _read(model: ImageGPT, file: str) -> Tensor:
    """An uploaded image at the model's resolution and in its palette: tokens [1, n]."""
    square = Transform(model.config.resolution)(file)
    return torch.from_numpy(palette_of(model).transform(square).reshape(1, -1).astype(np.int64))


def _enlarge(picture: NDArray[np.uint8]) -> Image.Image:
    return image_grid([[picture]], scale=math.ceil(_SIDE / len(picture)), gap=0)


def _draw(model: ImageGPT, tokens: Tensor, rows: int, count: int, temperature: float, seed: int) -> Iterator[Any]:
    """Yields all pictures drawn so far, with captions, and words on the progress.

    One is drawn after the other, not all in a batch: each shows as soon as it is done, and has a seed of its own.
    """
    import gradio as gr

    gallery: list[tuple[Image.Image, str]] = []
    yield gallery, f"Drawing 1 of {count} ..."
    for drawing in range(count):
        for state in _watch(partial(complete, model, tokens, rows, temperature=temperature, seed=seed + drawing)):
            if isinstance(state, float):
                yield gr.skip(), f"Drawing {drawing + 1} of {count}: {state:.0%} ..."
            else:
                gallery.append((_enlarge(pictures(model, state)[0]), f"seed {seed + drawing}"))
                yield gallery, f"{drawing + 1} of {count} drawn."


def _watch(work: Callable[..., Tensor]) -> Iterator[float | Tensor]:
    """Runs `work(progress=...)` in a thread; yields the share that is done now and then, and at last its result.

    Closing the iterator, as Gradio does when a user presses Stop or leaves, ends the work at its next place.
    """
    share, stopped, result = [0.0], threading.Event(), Future[Tensor]()

    def report(done: int, total: int) -> None:
        if stopped.is_set() or not threading.main_thread().is_alive():  # the latter: the program is ending
            raise InterruptedError
        share[0] = done / total

    def run() -> None:
        try:
            result.set_result(work(progress=report))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="igpt drawing").start()
    try:
        while not wait([result], _POLL).done:
            yield share[0]
        yield result.result()
    finally:
        stopped.set()


@torch.inference_mode()
def _score(model: ImageGPT, tokens: Tensor) -> tuple[Image.Image, str]:
    """The losses of an image, tokens [1, n], as a picture and in words."""
    from matplotlib import colormaps

    tokens = tokens.to(model.wte.weight.device)
    losses = place_losses(model(tokens), tokens)[0].double().cpu().numpy()  # [n]
    result, blind = summary(losses.mean(keepdims=True)), math.log(model.config.n_colors)
    shares = (losses / (blind or 1)).clip(0, 1).reshape(model.config.resolution, -1)  # of a palette of one colour: 0
    return _enlarge((255 * colormaps["cividis"](shares)[..., :3]).round().astype(np.uint8)), (
        f"**{result['nats_per_pixel']:.4f} nats/pixel** ({result['bits_per_pixel']:.4f} bits/pixel) on average. Pixels "
        f"that the model foresaw are dark blue (0 nats); yellow ones cost {blind:.2f} nats or more, as much as a blind "
        f"guess among {model.config.n_colors} colours."
    )
