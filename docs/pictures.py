"""Draw the pictures of the concepts page as SVG: `python docs/pictures.py`. The output is
deterministic.

All contents are made here or come from the bundled digits. Lines and letters have a grey that is
readable on white and on black; there is no background.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from igpt import Palette

OUT = Path(__file__).parent / "pictures"
GREY, BLUE, ORANGE = "#808080", "#3f8fd9", "#e0702f"
Grid = NDArray[np.uint8]


class Drawing:
    """An SVG that is being drawn."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" '
            f'height="{height:g}" font-family="sans-serif" font-size="12" fill="{GREY}">'
            f"<title>{title}</title>"
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 12,
        color: str = GREY,
        anchor: str = "middle",
    ) -> None:
        look = "" if size == 12 else f' font-size="{size}"'
        look += "" if color == GREY else f' fill="{color}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{look}>{words}</text>')

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        *,
        fill: str = "none",
        line: str = GREY,
        dash: bool = False,
    ) -> None:
        dashes = ' stroke-dasharray="3 2"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
            f'fill="{fill}" stroke="{line}"{dashes}/>'
        )

    def labelled(
        self, x: float, y: float, w: float, h: float, words: str, *, line: str = GREY
    ) -> None:
        self.box(x, y, w, h, line=line)
        self.text(x + w / 2, y + h / 2 + 4, words, color=line)

    def path(
        self, points: list[tuple[float, float]], *, color: str = GREY, arrow: bool = True
    ) -> None:
        """Draw a line through some points, with an arrow at its end."""
        line = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            ux, uy = (x - x0) / length, (y - y0) / length
            left = (x - 5 * ux + 3 * uy, y - 5 * uy - 3 * ux)
            right = (x - 5 * ux - 3 * uy, y - 5 * uy + 3 * ux)
            line += f"M{left[0]:.1f} {left[1]:.1f}L{x:g} {y:g}L{right[0]:.1f} {right[1]:.1f}"
        self.parts.append(f'<path d="{line}" fill="none" stroke="{color}"/>')

    def pixels(
        self, x: float, y: float, side: float, grid: Grid, shown: NDArray[np.bool_] | None = None
    ) -> None:
        """Draw an image [H, W, 3] of pixels with this side; pixels that are not shown are replaced
        by a dot."""
        height, width = grid.shape[:2]
        colors: dict[str, str] = {}
        dots = ""
        for row in range(height):
            for column in range(width):
                left, top = x + column * side, y + row * side
                if shown is None or shown[row, column]:
                    color = "#{:02x}{:02x}{:02x}".format(*grid[row, column])
                    colors[color] = (
                        colors.get(color, "") + f"M{left:g} {top:g}h{side:g}v{side:g}h-{side:g}z"
                    )
                else:
                    dots += f"M{left + side / 2 - 1:g} {top + side / 2:g}h2"
        self.parts += [f'<path d="{where}" fill="{color}"/>' for color, where in colors.items()]
        self.parts += [f'<path d="{dots}" stroke="{GREY}" stroke-width="2"/>'] if dots else []
        self.box(x, y, width * side, height * side)

    def save(self, name: str) -> None:
        (OUT / f"{name}.svg").write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def digit(number: int) -> tuple[NDArray[np.int64], Grid]:
    """Return levels 0..16 and grey pixels of one of the digits."""
    levels = load_digits().images[number].astype(np.int64)
    return levels, np.repeat((levels * 255 / 16).round().astype(np.uint8)[..., None], 3, axis=2)


def palette() -> None:
    ramp = np.linspace(0, 1, 10)
    across, down = np.meshgrid(ramp, ramp)
    image = np.stack(
        [60 + 190 * across, 60 + 150 * down, 230 - 160 * across * down - 40 * down], axis=2
    ).astype(np.uint8)
    fitted = Palette(6, seed=0).fit(image)
    tokens = fitted.transform(image)
    made = Drawing(
        600, 190, "An image, its palette, its tokens, and the image made from the tokens"
    )
    made.pixels(10, 30, 12, image)
    made.text(70, 20, "image")
    made.text(70, 170, "100 colours")
    made.path([(138, 90), (158, 90)])
    made.text(200, 20, "palette")
    for token, color in enumerate(fitted.colors):
        made.box(175, 30 + 20 * token, 20, 20, fill="#{:02x}{:02x}{:02x}".format(*color))
        made.text(210, 44 + 20 * token, str(token), anchor="start")
    made.text(200, 170, "k = 6")
    made.path([(232, 90), (252, 90)])
    made.text(330, 20, "tokens")
    made.box(262, 30, 136, 120)
    for row in range(10):
        made.text(330, 40 + 12 * row, " ".join(map(str, tokens[row])), size=11)
    made.path([(406, 90), (426, 90)])
    made.pixels(440, 30, 12, fitted.inverse_transform(tokens))
    made.text(500, 20, "reconstruction")
    made.text(500, 170, f"squared error {fitted.inertia_ / 3:.0f} per channel")
    made.save("palette")


def tokens() -> None:
    levels, image = digit(2)
    made = Drawing(600, 220, "Raster order: rows from top to bottom become one sequence")
    made.pixels(10, 30, 16, image)
    made.text(74, 20, "8 x 8 pixels")
    made.path([(146, 94), (166, 94)])
    made.text(262, 20, "tokens 0 .. 16")
    for row in range(8):
        made.box(180, 30 + 16 * row, 164, 16, line=BLUE if row == 2 else GREY)
        for column in range(8):
            made.text(191 + 20.3 * column, 42 + 16 * row, str(levels[row, column]), size=11)
    made.path([(352, 94), (372, 94)])
    made.text(480, 20, "n = 64 tokens")
    for row in range(3):
        made.path([(385, 44 + 32 * row), (575, 44 + 32 * row)], color=BLUE if row == 2 else GREY)
        if row < 2:
            made.path([(575, 48 + 32 * row), (385, 72 + 32 * row)], arrow=False)
    made.text(480, 136, "... row by row")
    made.text(10, 190, "the sequence:", anchor="start")
    made.text(105, 190, " ".join(map(str, levels.ravel()[:26])) + " ...", anchor="start", size=12)
    made.save("tokens")


def sequence() -> None:
    made = Drawing(
        640,
        190,
        "The sequence is shifted by one position: token i is predicted from the tokens before it",
    )
    names = ["start", "x1", "x2", "x3", "...", "x(n-1)"]
    goals = ["x1", "x2", "x3", "x4", "...", "xn"]
    made.text(86, 164, "input", anchor="end", size=11)
    made.text(86, 34, "predicted", anchor="end", size=11)
    for position, (name, goal) in enumerate(zip(names, goals, strict=True)):
        x = 98 + 86 * position
        made.labelled(x, 145, 70, 28, name, line=ORANGE if position == 0 else GREY)
        made.labelled(x, 15, 70, 28, goal, line=BLUE)
        for before in range(position + 1):
            if "..." not in (name, names[before]):
                made.path(
                    [(133 + 86 * before, 143), (x + 35, 47)],
                    color=BLUE if before == position else GREY,
                    arrow=before == position,
                )
    made.save("sequence")


def objectives() -> None:
    _, image = digit(2)
    positions = np.arange(64).reshape(8, 8)
    hidden = np.random.default_rng(4).random((8, 8)) < 0.15
    made = Drawing(600, 220, "Two objectives: the next pixel, and masked pixels")
    for x, title, shown, asked, lines in (
        (
            20,
            "autoregressive",
            positions < 35,
            positions == 35,
            [
                "pixel 36 is predicted from the 35 before it;",
                "all pixels are predicted in one pass",
            ],
        ),
        (
            320,
            "BERT",
            ~hidden,
            hidden,
            ["15 % of the pixels are masked,", "each is predicted from the others"],
        ),
    ):
        made.text(x + 64, 18, title)
        made.pixels(x, 28, 16, image, shown)
        for row, column in zip(*np.nonzero(asked), strict=True):
            made.box(x + 16 * column, 28 + 16 * row, 16, 16, line=ORANGE)
            made.text(x + 16 * column + 8, 28 + 16 * row + 13, "?", color=ORANGE)
        # The attention mask: queries in rows, keys in columns.
        for row in range(8):
            for column in range(8):
                sees = column <= row if title == "autoregressive" else True
                made.box(
                    x + 160 + 12 * column, 38 + 12 * row, 12, 12, fill=BLUE if sees else "none"
                )
        made.text(x + 208, 150, "attention mask", size=11)
        for number, line in enumerate(lines):
            made.text(x, 182 + 17 * number, line, anchor="start")
    made.save("objectives")


def transformer() -> None:
    made = Drawing(680, 410, "The transformer, and where features are read")
    y = 372
    made.labelled(110, y, 180, 26, "tokens: start, x1 .. x(n-1)")
    made.path([(200, y), (200, y - 22)])
    made.labelled(110, y - 48, 180, 26, "token + position embeddings")
    made.path([(200, y - 48), (200, 296)])
    made.box(90, 96, 220, 200, dash=True)
    made.text(84, 200, "block l,", anchor="end")
    made.text(84, 216, "L times", anchor="end")
    for base, inner in ((286, "attention"), (186, "MLP, 4 times as wide")):
        made.path([(200, base + 10), (200, base - 8)])
        made.labelled(165, base - 28, 70, 20, "norm", line=ORANGE if inner == "attention" else GREY)
        made.path([(200, base - 28), (200, base - 36)])
        made.labelled(130, base - 58, 140, 22, inner)
        made.path([(200, base - 58), (200, base - 68)])
        made.path([(200, base + 3), (296, base + 3), (296, base - 76), (210, base - 76)])
        made.text(200, base - 72, "+", size=16)
        made.path([(200, base - 82), (200, base - 92)], arrow=False)
    made.path([(200, 96), (200, 78)])
    made.labelled(165, 56, 70, 22, "norm", line=ORANGE)
    made.path([(200, 56), (200, 38)])
    made.labelled(120, 12, 160, 26, "logits of k colours", line=BLUE)
    made.path([(235, 268), (352, 268)], color=ORANGE)
    made.path([(235, 67), (352, 67)], color=ORANGE)
    made.text(358, 263, "n^l: the input of the attention of block l", anchor="start", color=ORANGE)
    made.text(358, 279, "(l = 0 .. L-1)", anchor="start", color=ORANGE)
    made.text(358, 64, "n^L: the final norm's output", anchor="start", color=ORANGE)
    made.path([(440, 250), (440, 190)], color=ORANGE)
    made.path([(440, 74), (440, 134)], color=ORANGE)
    made.labelled(358, 136, 300, 52, "mean over positions: D features per image", line=ORANGE)
    made.path([(560, 188), (560, 214)], color=ORANGE)
    made.text(560, 228, "linear classifier (the probe)", color=ORANGE)
    made.save("transformer")


def finetuning() -> None:
    made = Drawing(
        640, 170, "Fine-tuning: two heads on the final norm, and the sum of their losses"
    )
    made.labelled(20, 66, 110, 30, "all L blocks")
    made.path([(130, 81), (160, 81)])
    made.labelled(160, 66, 90, 30, "final norm")
    made.path([(250, 76), (300, 40)], color=ORANGE)
    made.path([(250, 86), (300, 122)], color=BLUE)
    made.labelled(300, 22, 150, 34, "mean, class head", line=ORANGE)
    made.labelled(300, 106, 150, 34, "logits of all positions", line=BLUE)
    made.path([(450, 39), (496, 74)], color=ORANGE)
    made.path([(450, 123), (496, 88)], color=BLUE)
    made.text(505, 86, "+", size=16)
    made.text(520, 77, "class loss", anchor="start", color=ORANGE, size=11)
    made.text(520, 92, "generative loss", anchor="start", color=BLUE, size=11)
    made.save("finetuning")


def drawing() -> None:
    _, image = digit(2)
    positions = np.arange(64).reshape(8, 8)
    # A made-up order of a BERT model's confidence.
    order = np.random.default_rng(2).permutation(64).reshape(8, 8)
    made = Drawing(600, 330, "Completion: in raster order, or the most confident positions first")
    for y, title, when in (
        (28, "autoregressive: pixel by pixel", np.where(positions < 32, 0, positions - 31)),
        (
            194,
            "BERT: the most confident positions first, 16 rounds",
            np.where(positions < 32, 0, 1 + order // 2),
        ),
    ):
        made.text(10, y - 10, title, anchor="start")
        for number, (known, words) in enumerate(
            ((0, "known pixels"), (8, ""), (20, ""), (64, "complete"))
        ):
            x = 10 + 150 * number
            made.pixels(x, y, 14, image, when <= known)
            made.text(x + 56, y + 128, words, size=11)
            if number < 3:
                made.path([(x + 118, y + 56), (x + 142, y + 56)])
    made.save("drawing")


def architecture() -> None:
    """Draw the packages: each imports only from packages above it."""
    made = Drawing(640, 560, "The packages of igpt; a package imports only from those above it")
    layers = (
        ("errors, files, locks, config, statistics, hub, ...", "shared by all packages"),
        ("data", "images -> palette -> tokens: sources, images, tokens"),
        ("model", "config, transformer, objectives, model directory"),
        ("sampling", "decoder and sampler: images from a model"),
        ("evaluation", "features, probe, likelihood: figures from a model"),
        ("training", "settings, engine, trainer: pretrain and finetune"),
        ("planning", "memory and time of a run, before it starts"),
        ("report", "pages, model cards and figures from recorded results"),
        ("reproduction", "the runs that answer the paper's questions"),
        ("webapp", "the page of igpt app"),
        ("cli", "one function per command"),
    )
    for number, (name, purpose) in enumerate(layers):
        y = 14 + 49 * number
        line = {"data": ORANGE, "model": ORANGE, "training": ORANGE}.get(name, GREY)
        made.labelled(20, y, 600, 34, f"{name}:  {purpose}", line=line)
        if number:
            made.path([(320, y), (320, y - 13)])
    made.save("architecture")


ALL = (palette, tokens, sequence, objectives, transformer, finetuning, drawing, architecture)

if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for draw in ALL:
        draw()
