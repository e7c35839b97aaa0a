"""The web page of a trained model (Gradio): it completes, scores and samples images."""

import atexit
import errno
import html
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from igpt.errors import InputError
from igpt.interrupts import Terminated
from igpt.model.cost import count_parameters
from igpt.model.match import palette_of
from igpt.model.transformer import ImageGPT
from igpt.report.figures import encode
from igpt.webapp import markup
from igpt.webapp.about import about, about_card
from igpt.webapp.guard import Guard, names_of
from igpt.webapp.handlers import (
    GONE,
    HOTTEST,
    MOST_DRAWINGS,
    MOST_GUIDANCE,
    classes,
    classifier_of,
    crop,
    drawings,
    fitted,
    known_positions,
    read,
    score,
    view,
    write_examples,
    write_photographs,
)

if TYPE_CHECKING:
    import gradio as gr

_UPLOAD = 20  # MB at most
_WAITING = 8  # requests at most in the queue; further ones get a message
_AT_ONCE = 2  # samplings at once; further ones wait, and show their position in the queue
_TURN = "Waiting for a turn ..."  # until the first message of the work
_UPLOADS = 200  # MB of all uploads; beyond it, the least recently used are deleted
_ARRIVAL = 60  # seconds in which the body of a request has to arrive
_UNUSED = 15 * 60  # seconds after which an unused upload is deleted from the disk
_CLEANING = 60  # seconds between two checks for them
_MB = 1 << 20
_THUMBNAIL = 88  # pixels of an example: twice its size on the page, for sharp screens


def build(
    model: ImageGPT, run: Path | None = None, name: str = "", card: Path | None = None
) -> "gr.Blocks":
    """Return the page, not served yet.

    Endpoints: `complete`, `score`, `sample`; with a BERT model `complete` and `view`.

    Args:
        run: the model's run directory, which the page describes; its test images are the examples.
            Without a run, `photographs` are.
        name: of the model, for the title and the heading.
        card: of a model without a run, Markdown with pictures next to it, which the page shows.

    Raises:
        InputError: the model has no palette, gradio is not installed, or a file of the run is
            damaged.
    """
    if find_spec("gradio") is None:
        raise InputError("the web page needs gradio: pip install 'igpt[app]'")
    import gradio as gr

    palette_of(model)
    _upload_folder()  # Gradio reads it when the components of a page are created
    story: gr.HTML | gr.Markdown | None = None
    if run is not None and (run / "metrics.jsonl").is_file():
        story = gr.HTML(about(run), apply_default_css=False, render=False)
    elif card is not None:
        story = gr.Markdown(
            about_card(card), latex_delimiters=[], elem_classes="igpt-card", render=False
        )
    page = _page(
        title=f"{name} - igpt" if name else "igpt",
        analytics_enabled=False,
        delete_cache=(_CLEANING, _UNUSED),
    )
    with page:
        if story is None:
            _workbench(model, run, name)
        else:
            with gr.Tab("Draw"):
                _workbench(model, run, name)
            with gr.Tab("About this model"):
                story.render()  # type: ignore[no-untyped-call]
    page.queue(max_size=_WAITING)
    return page


@cache
def _upload_folder() -> Path:
    """Return the private folder of uploads of this process; it is removed at exit."""
    parent = os.environ.get("GRADIO_TEMP_DIR") or None
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="igpt-uploads-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def _page(**settings: Any) -> "gr.Blocks":
    """Return an empty page that answers invalid inputs with a message, not a traceback."""
    import gradio as gr

    class Page(gr.Blocks):
        async def preprocess_data(self, block_fn: Any, *inputs: Any, **more: Any) -> Any:
            if block_fn.fn is None:
                raise gr.Error("the browser does this by itself", print_exception=False)
            try:
                return await super().preprocess_data(block_fn, *inputs, **more)
            except gr.Error as error:
                raise gr.Error(error.message, print_exception=False) from None
            except FileNotFoundError:
                raise gr.Error(GONE, print_exception=False) from None
            except Exception as error:
                said = next(iter(str(error).strip().splitlines()), type(error).__name__)
                reason = f"these inputs do not fit: {said[:200]}"
                raise gr.Error(html.escape(reason, quote=False), print_exception=False) from None

    return Page(**settings)


def _workbench(model: ImageGPT, run: Path | None, name: str) -> None:
    """Add the image on the left and the model's output on the right."""
    import gradio as gr

    config, scored = model.config, model.config.trained_as.has_likelihood
    classifier = classifier_of(model, run)
    classified = classifier is not None or config.class_names is not None

    def look(file: str | None) -> Iterator[list[Any]]:
        def answers() -> Iterator[list[Any]]:
            yield nothing("" if file is None else "Reading the image ...")
            if file is not None:
                tokens = read(model, file)
                losses, said = score(model, tokens) if scored else ([], "")
                ranked = [classes(model, tokens, classifier)] if classified else []
                yield [view(model, tokens), crop(model, file), said, *[losses] * scored, *ranked]

        def nothing(said: str) -> list[Any]:
            return [None, [], said, *[[]] * scored, *[None] * classified]

        yield from _with_errors(answers(), nothing)

    def completions(
        file: str | None,
        rows: int,
        seen: Any,
        count: Any,
        temperature: Any,
        seed: Any,
        top_k: Any = None,
        top_p: Any = None,
        class_name: Any = "",
        guidance: Any = 1,
    ) -> Iterator[list[Any]]:
        settings = (count, temperature, seed, top_k, top_p, class_name, guidance)

        def answers() -> Iterator[list[Any]]:
            if file is None:
                raise InputError("choose an image first")
            tokens = read(model, file)
            yield from drawings(
                model, tokens, known_positions(model, rows, seen), *settings, original=True
            )

        yield from _with_errors(answers(), lambda said: [gr.skip(), said, gr.skip()])

    def samples(
        count: Any,
        temperature: Any,
        seed: Any,
        top_k: Any = None,
        top_p: Any = None,
        class_name: Any = "",
        guidance: Any = 1,
    ) -> Iterator[list[Any]]:
        settings = (count, temperature, seed, top_k, top_p, class_name, guidance)
        nothing = torch.zeros(1, config.n_pixels, dtype=torch.long)
        answers = drawings(model, nothing, nothing[0] > 0, *settings, original=False)
        yield from _with_errors(answers, lambda said: [gr.skip(), said, gr.skip()])

    plain: dict[str, Any] = {"apply_default_css": False, "padding": False}
    still = {**plain, "js_on_load": None}
    size = count_parameters(config)
    parameters = f"{size / 1e6:.1f} million" if size >= 1e6 else f"{size:,}"
    named = f" with {html.escape(name, quote=False)}" if name else ""
    gr.Markdown(
        f"# Completing images{named}\n{parameters} parameters, trained to predict "
        f"{config.trained_as.predicts}, in images of {config.resolution} by "
        f"{config.resolution} pixels and {config.n_colors} colours. Choose an image: its middle "
        "square is brought to that size, and the model draws the pixels that you hide."
    )
    with gr.Row():
        with gr.Column(min_width=300):
            file = gr.File(label=f"Image, at most {_UPLOAD} MB", file_types=["image"], height=140)
            _examples(model, run, file)
            uploaded = gr.HTML(
                [], html_template=markup.UPLOAD, elem_classes="igpt-uploaded", **still
            )
            rows = gr.Slider(
                0,
                config.resolution,
                config.resolution // 2,
                step=1,
                label="Rows to keep",
                info="What is below them is hidden. Or paint on the picture what shall be hidden."
                + scored
                * " The model sees only what lies above a pixel, or left of it in its row.",
            )
            with gr.Row():
                with gr.Column(min_width=200):
                    seen = gr.HTML(html_template=markup.VIEW, js_on_load=markup.PAINT, **plain)
                with gr.Column(min_width=200):
                    lost = gr.HTML([], html_template=markup.PICTURES, visible=scored, **still)
            said = gr.Markdown()
            by = f"Class, by a linear probe of layer {classifier.layer}" if classifier else "Class"
            label = gr.Label(label=by, num_top_classes=3, visible=classified)
        with gr.Column(min_width=300):
            with gr.Row():
                count = gr.Slider(1, MOST_DRAWINGS, 4, step=1, label="Drawings", min_width=130)
                info = "1: as learned; 0: the likeliest colours."
                temperature = gr.Slider(
                    0, HOTTEST, 1, step=0.05, label="Temperature", info=info, min_width=130
                )
            with gr.Row():
                # Gradio shows an empty field as 0, so the values that limit nothing are shown.
                colors = config.n_colors
                info = f"Only the k likeliest colours; {colors}: all."
                top_k = gr.Number(colors, label="Top-k", info=info, min_width=130)
                info = "Only the likeliest colours that reach this probability; 1: all."
                top_p = gr.Number(1, step=0.05, label="Top-p", info=info, min_width=130)
            of_class: list[Any] = []
            if config.conditions:
                with gr.Row():
                    names = [("no class", ""), *((name, name) for name in config.conditions)]
                    menu = gr.Dropdown(names, value="", label="Draw a class", min_width=130)
                    info = "With a class. 1: as learned; more: further from no class."
                    guidance = gr.Slider(
                        0, MOST_GUIDANCE, 2, step=0.5, label="Guidance", info=info, min_width=130
                    )
                of_class = [menu, guidance]
            with gr.Row(equal_height=False, elem_classes="igpt-seed"):
                info = "The same seed and settings give the same drawings."
                seed = gr.Number(0, label="Seed", info=info, min_width=130)
                seed_button = gr.Button("New seed", min_width=130, scale=0)
            with gr.Row():
                complete_button = gr.Button("Complete", variant="primary", min_width=80)
                sample_button = gr.Button("Sample", min_width=80, visible=scored)
                stop_button = gr.Button("Stop", min_width=80)
            words = gr.Markdown(elem_classes="igpt-words")
            drawn = gr.HTML([], html_template=markup.PICTURES, **still)
            archive = gr.HTML("", html_template=markup.ARCHIVE, **still)
    looks = [seen, uploaded, said, *[lost] * scored, *[label] * classified]
    looking = file.change(
        look, file, looks, api_name="score" if scored else "view", show_progress="hidden"
    )
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    looking.success(None, [rows, seen], seen, js=markup.KEEP_ROWS, **quiet)
    rows.change(None, [rows, seen], seen, js=markup.KEEP_ROWS, **quiet)
    queue: dict[str, Any] = {
        "concurrency_id": "drawing",
        "concurrency_limit": _AT_ONCE,
        "show_progress": "hidden",
    }
    settings = [count, temperature, seed, top_k, top_p, *of_class]
    results = [drawn, words, archive]
    seed_button.click(None, None, seed, js=markup.NEW_SEED, **quiet)
    file.change(None, None, words, js="() => ''", **quiet)
    starts: list[tuple[Any, Any, list[Any], str]] = [
        (complete_button, completions, [file, rows, seen, *settings], "complete")
    ]
    if scored:
        starts.append((sample_button, samples, settings, "sample"))
    work = []
    for button, answer, inputs, name in starts:
        button.click(None, None, words, js=f"() => {_TURN!r}", **quiet)
        work.append(button.click(answer, inputs, results, api_name=name, **queue))
        # Gradio reports inputs that do not fit in a notification, before the work starts.
        not_waiting = f"(said) => said === {_TURN!r} ? '' : said"
        work[-1].failure(None, words, words, js=not_waiting, **quiet)
    stopping = stop_button.click(None, cancels=work, api_visibility="private")
    stopping.then(lambda: "Stopped.", None, words, queue=False, api_visibility="private")


def _examples(model: ImageGPT, run: Path | None, file: Any) -> None:
    """Add images to select instead of a file.

    They are test images of the run, if its tokens exist; without a run they are photographs.
    """
    import gradio as gr

    folder = tempfile.TemporaryDirectory(prefix="igpt-")
    if run is None:
        paths = write_photographs(Path(folder.name))
    else:
        paths = write_examples(model, run, Path(folder.name))
    if not paths:
        return
    shown = [encode(fitted(Image.open(path), _THUMBNAIL)) for path in paths]

    def choose(event: gr.EventData) -> str:
        try:
            index = getattr(event, "index", None)
        except TypeError:  # Gradio looks in the data of the event, which a stranger may leave out
            index = None
        if type(index) is not int or not 0 <= index < len(paths):
            raise gr.Error(f"there are {len(paths)} examples", print_exception=False)
        return str(Path(folder.name) / paths[index].name)

    examples = gr.HTML(
        shown, html_template=markup.EXAMPLES, js_on_load=markup.CHOOSE, apply_default_css=False
    )
    examples.select(choose, None, file, show_progress="hidden", api_visibility="private")


def start(
    model: ImageGPT,
    host: str,
    port: int,
    run: Path | None = None,
    name: str = "",
    card: Path | None = None,
) -> "gr.Blocks":
    """Serve the page at host:port and return it; its `close()` ends it.

    Raises:
        InputError: the port is in use, nothing can listen at this address, or see `build`.
    """
    page = build(model, run, name, card)
    import gradio as gr
    from starlette.middleware import Middleware

    try:  # Gradio would report every reason as a lack of free ports
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            port = probe.getsockname()[1]  # any free port
    # The last two: not a host name.
    except (OSError, OverflowError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            problem = f"port {port} of {host} is in use; choose another with --port"
        else:
            problem = f"the page cannot be served at {host}, port {port}: {error}"
        raise InputError(problem) from None
    # Gradio sends a request to its own server to check that it is up; it must not go through a
    # proxy.
    direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host, "localhost")
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    # No font from another host.
    theme = gr.themes.Default(primary_hue="blue", font=("system-ui", "sans-serif"))
    # Larger images are refused with a message anyway.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    names, any_number = names_of(host)
    guard = Middleware(
        Guard,
        names=names,
        any_number=any_number,
        uploads=_upload_folder(),
        largest=_UPLOAD * _MB,
        most=_UPLOADS * _MB,
        seconds=_UNUSED,
        arrival=_ARRIVAL,
    )
    page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        ssr_mode=False,
        run_history=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=["api"],
        max_file_size=f"{_UPLOAD}mb",
        css=markup.STYLE,
        theme=theme.set(block_info_text_color="*neutral_500"),
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"middleware": [guard]},
    )
    return page


def serve(
    model: ImageGPT,
    host: str,
    port: int,
    run: Path | None = None,
    name: str = "",
    card: Path | None = None,
) -> None:
    """Serve the page at host:port until Ctrl-C; see `build`.

    Raises:
        InputError: see `start`.
        Terminated: on SIGTERM.
    """
    page = start(model, host, port, run, name, card)
    try:
        print(f"{page.local_url} shows the page; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(1)
    except Terminated:
        raise
    except KeyboardInterrupt:
        return
    finally:
        page.close(verbose=False)


def _with_errors(
    answers: Iterator[Any], on_page: Callable[[str], list[Any]]
) -> Iterator[list[Any]]:
    """Yield answers; show a user error instead of them, and report it to programs too.

    Gradio's own notification of it is hidden: the message on the page stays.
    """
    import gradio as gr

    try:
        yield from answers
    except InputError as error:
        said = html.escape(str(error), quote=False)
        yield on_page(f'<div class="igpt-error">{said[:1].upper()}{said[1:]}.</div>')
        raise gr.Error(said, print_exception=False, visible=False) from None
