"""A web page for a trained model (Gradio): it completes, scores and draws images. Nothing leaves the machine.

n places, R resolution.
"""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from igpt.data.images import decode, to_square
from igpt.errors import InputError
from igpt.evaluation.likelihood import summary
from igpt.model.generate import complete
from igpt.model.objectives import place_losses
from igpt.model.transformer import ImageGPT
from igpt.pictures import palette_of, pictures
from igpt.report.figures import image_grid

if TYPE_CHECKING:
    import gradio as gr

_MOST = 8  # drawings at a time
_UPLOAD = "20 MB"
_WAITING = 8  # requests in the queue; further ones are told to come back later
_SIDE = 256  # pixels on the screen that a picture gets at least
_KEPT = 3600  # seconds after which uploads and drawings are deleted from the disk
_POLL = 0.25  # seconds between two words on the progress
_STYLE = """
.pixels img { image-rendering: pixelated; }
"""


def build(model: ImageGPT) -> "gr.Blocks":
    """The page, not yet served. Endpoints: `complete`, and for autoregressive models `score` and `sample`.

    Raises:
        InputError: the model has no palette, or gradio is not installed.
    """
    gr = _gradio()
    palette_of(model)
    scored, resolution = model.config.objective == "autoregressive", model.config.resolution

    def look(file: str | None) -> Any:
        if file is None:
            return (None, None, "") if scored else None
        with _told():
            tokens = _read(model, file)
        seen = _enlarge(pictures(model, tokens)[0])
        return (seen, *_score(model, tokens)) if scored else seen

    def completions(file: str | None, rows: int, count: int, temperature: float, seed: int) -> Iterator[Any]:
        with _told():
            if file is None:
                raise InputError("choose an image first")
            yield from _draw(model, _read(model, file), rows, count, temperature, seed)

    def samples(count: int, temperature: float, seed: int) -> Iterator[Any]:
        with _told():
            nothing = torch.zeros(1, model.config.n_places, dtype=torch.long)
            yield from _draw(model, nothing, 0, count, temperature, seed)

    def picture(label: str) -> Any:
        return gr.Image(
            label=label, format="png", interactive=False, height=_SIDE, min_width=130, elem_classes="pixels"
        )

    with gr.Blocks(title="igpt", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as page:
        gr.Markdown(_introduction(model))
        with gr.Row():
            with gr.Column(min_width=300):
                file = gr.File(label=f"Image, at most {_UPLOAD}", file_types=["image"], height=140)
                with gr.Row():
                    outputs = [picture("As the model sees it")]
                    if scored:
                        outputs.append(picture("Loss of every pixel"))
                if scored:
                    outputs.append(gr.Markdown())
            with gr.Column(min_width=300):
                rows = gr.Slider(0, resolution, resolution // 2, step=1, label="Rows to keep, from the top")
                count = gr.Slider(1, _MOST, 4, step=1, label="Drawings")
                info = "1 draws as the model learned, 0 takes the likeliest colours."
                temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature", info=info)
                info = "The same seed and settings give the same drawing; the next drawing takes the next seed."
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**53, label="Seed", info=info)
                with gr.Row():
                    complete_button = gr.Button("Complete", variant="primary", min_width=80)
                    sample_button = gr.Button("Sample", min_width=80, visible=scored)
                    stop_button = gr.Button("Stop", min_width=80)
                words = gr.Markdown()
                gallery = gr.Gallery(label="Drawings", format="png", object_fit="contain", elem_classes="pixels")
        file.change(look, file, outputs, api_name="score" if scored else "view", show_progress="hidden")
        # One drawing at a time, whoever asked for it; looking at an image need not wait for it.
        queue: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "show_progress_on": words}
        drawn, settings = [gallery, words], [count, temperature, seed]
        running = [complete_button.click(completions, [file, rows, *settings], drawn, api_name="complete", **queue)]
        if scored:
            running.append(sample_button.click(samples, settings, drawn, api_name="sample", **queue))
        stop_button.click(None, cancels=running, api_visibility="private").then(
            lambda: "Stopped.", None, words, queue=False, api_visibility="private"
        )
    page.queue(max_size=_WAITING, default_concurrency_limit=1)
    return page  # type: ignore[no-any-return]


def start(model: ImageGPT, host: str, port: int) -> "gr.Blocks":
    """Serves the page at host:port and returns; `close()` of what it returns ends it.

    Raises:
        InputError: the port is in use, nothing can listen at this address, or see `build`.
    """
    page = build(model)
    _require_free(host, port)
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            prevent_thread_lock=True,
            max_file_size=_UPLOAD.replace(" ", "").lower(),
            theme=_gradio().themes.Default(primary_hue="blue"),  # its fonts come with gradio
            css=_STYLE,
            footer_links=["api"],
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
        )
    except OSError as error:
        raise InputError(f"nothing can listen at {host}, port {port}: {error}") from None
    return page  # type: ignore[no-any-return]


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


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise InputError("the web page needs gradio: pip install 'igpt[app]'") from None
    return gradio


def _require_free(host: str, port: int) -> None:
    """Refuses an address that nothing can listen at. Gradio would call every reason a lack of free ports."""
    if not 1 <= port <= 65535:
        raise InputError(f"ports are 1 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # where this allows a port that was closed a moment ago, and not one in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise InputError(f"nothing can listen at {host}, port {port}: {error.strerror}; try another --port") from None


def _introduction(model: ImageGPT) -> str:
    config = model.config
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    learned = "the next pixel from those before it" if config.objective == "autoregressive" else "hidden pixels"
    return (
        f"# Pixels by a transformer\n{millions:.1f} million parameters, trained to predict {learned}, in images of "
        f"{config.resolution} by {config.resolution} pixels and {config.n_colors} colours. Choose an image: its middle "
        "square is brought to that size, and the model draws what is below the rows you keep."
    )


@contextmanager
def _told() -> Iterator[None]:
    """Shows a user's mistake on the page, which takes messages for HTML."""
    try:
        yield
    except InputError as error:
        raise _gradio().Error(html.escape(str(error), quote=False), print_exception=False) from None


def _read(model: ImageGPT, file: str) -> Tensor:
    """An uploaded image at the model's resolution and in its palette: tokens [1, n]."""
    try:
        square = to_square(decode(file), model.config.resolution)
    except InputError as error:
        raise InputError(f"{Path(file).name}: {error}") from None
    return torch.from_numpy(palette_of(model).transform(square).reshape(1, -1).astype(np.int64))


def _enlarge(picture: NDArray[np.uint8]) -> Image.Image:
    return image_grid([[picture]], scale=math.ceil(_SIDE / len(picture)), gap=0)


def _draw(model: ImageGPT, tokens: Tensor, rows: int, count: int, temperature: float, seed: int) -> Iterator[Any]:
    """Draws `count` images one by one, with successive seeds; yields pictures with captions, and words on the progress.

    One by one, and not in one batch, so that each is shown when it is done and has a seed of its own.
    """
    gallery: list[tuple[Image.Image, str]] = []
    yield gallery, f"Drawing 1 of {count} ..."
    for drawing in range(count):
        work = partial(complete, model, tokens, rows, temperature=temperature, seed=seed + drawing)
        for state in _watch(work):
            if isinstance(state, Tensor):
                gallery = [*gallery, (_enlarge(pictures(model, state)[0]), f"seed {seed + drawing}")]
                yield gallery, f"{drawing + 1} of {count} drawn."
            else:
                yield _gradio().skip(), f"Drawing {drawing + 1} of {count}: {state:.0%} ..."


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
    shares = (losses / (blind or 1)).clip(0, 1).reshape(model.config.resolution, -1)
    words = (
        f"**{result['nats_per_pixel']:.4f} nats/pixel** ({result['bits_per_pixel']:.4f} bits/pixel) on average. Pixels "
        f"that the model foresaw are dark blue (0 nats); yellow ones cost {blind:.2f} nats or more, as much as a blind "
        f"guess among {model.config.n_colors} colours."
    )
    return _enlarge((255 * colormaps["cividis"](shares)[..., :3]).round().astype(np.uint8)), words
