"""A page of text as one picture: the token that asks, at its end, and what each layer selected of the tokens before."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

COLORS = ("#2e86ab", "#66a182", "#edae49", "#d1495b")  # of the layers, from the first
WIDTH, GAP = 88, 16  # characters of a column, and beside it
ASPECT = 2.3  # height of a line in widths of a character
INCHES = 0.082  # of a character
INK, FAINT = "#111111", "#9a9a9a"


@dataclass
class Page:
    """pieces: the text of each token up to the one that asks. layers: of each its name, the tokens that it selected and
    how much attention to all tokens gives to each. held: by the same names, how much they get together. definition: the
    tokens where the answer stands. window: tokens of a recency window of the same k. answer: lines about what follows.
    """

    pieces: list[str]
    layers: dict[str, dict[int, float]]
    held: dict[str, float]
    definition: range
    window: int
    answer: list[str]


def laid_out(pieces: list[str], width: int) -> tuple[list[list[tuple[int, int, str]]], int]:
    """Of each token its parts (line, column, text), and the number of lines; a line break is a blank of its own."""
    line = column = 0
    placed = []
    for piece in pieces:
        parts = []
        for character in piece.replace("\t", "    "):
            if column >= width and character != "\n":
                line, column = line + 1, 0
            if parts and parts[-1][0] == line:
                parts[-1] = (*parts[-1][:2], parts[-1][2] + character)
            else:
                parts.append((line, column, character))
            line, column = (line + 1, 0) if character == "\n" else (line, column + 1)
        placed.append([(y, x, text.replace("\n", " ")) for y, x, text in parts])
    return placed, line + 1


class Canvas:
    """Axes on which a character is one wide and a line one high, folded into columns of `rows` lines."""

    def __init__(self, lines: int, columns: int):
        self.rows = -(-lines // columns)
        self.width = columns * (WIDTH + GAP)
        self.top, height = 4.2, self.rows + 6.2
        self.figure = plt.figure(figsize=(INCHES * self.width, INCHES * ASPECT * height), dpi=110)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(-GAP / 2, self.width - GAP / 2), ylim=(self.rows + 2, -self.top))
        self.axes.axis("off")
        self.size = INCHES * 72 / 0.602  # points: the advance of DejaVu Sans Mono is .602 em

    def at(self, line: int, column: int) -> tuple[float, float]:
        return column + line // self.rows * (WIDTH + GAP), line % self.rows

    def write(self, x: float, y: float, text: str, size: float = 1, **style) -> None:
        style = {"family": "DejaVu Sans Mono", "va": "center", "color": INK} | style
        self.axes.text(x, y, text.replace("$", r"\$"), fontsize=size * self.size, **style)

    def box(self, x: float, y: float, width: float, height: float, **style) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0} | style))


def strength(mass: float) -> float:
    """How opaque a selected token's colour is: what attention wants most of stands out."""
    return min(0.95, 0.35 + 1.2 * mass**0.5)


def draw(page: Page, path: Path, columns: int = 2) -> None:
    placed, lines = laid_out(page.pieces, WIDTH)
    canvas = Canvas(lines, columns)
    asking = len(page.pieces) - 1
    band = 0.86 / len(page.layers)
    for token, parts in enumerate(placed):
        chosen = [selected.get(token) for selected in page.layers.values()]
        for line, column, text in parts:
            x, y = canvas.at(line, column)
            if token == asking:
                canvas.box(x, y - 0.5, len(text), 1, color=INK)
                canvas.write(x, y, text, color="white", weight="bold")
                continue
            for i, color in enumerate(COLORS[: len(chosen)]):
                if chosen[i] is not None:
                    canvas.box(x, y - 0.43 + i * band, len(text), band, color=color, alpha=strength(chosen[i]))
            canvas.write(x, y, text, color=FAINT if chosen == [None] * len(chosen) else INK)
    outline(canvas, [part for token in page.definition for part in placed[token]])
    beside(canvas, page, placed)
    header(canvas, page)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, metadata={"Software": None})
    plt.close(canvas.figure)


def outline(canvas: Canvas, parts: list[tuple[int, int, str]]) -> None:
    """A frame around the parts, one for each line."""
    for line in sorted({line for line, _, _ in parts}):
        columns = [(column, column + len(text)) for y, column, text in parts if y == line and text.strip()]
        if columns:
            x, y = canvas.at(line, min(columns)[0])
            width = max(end for _, end in columns) - min(columns)[0]
            canvas.box(x - 0.4, y - 0.62, width + 0.8, 1.24, fill=False, linewidth=2.2, edgecolor=INK)


def beside(canvas: Canvas, page: Page, placed: list) -> None:
    """In the margins: the window, where the answer stands, and what follows."""
    asking = len(placed) - 1
    first, last = placed[max(0, asking + 1 - page.window)][0][0], placed[asking][-1][0]
    for line in range(first, last + 1):
        x, y = canvas.at(line, 0)
        canvas.box(x - 2.2, y - 0.5, 0.9, 1, color=INK)
    x, y = canvas.at((first + last) // 2, 0)
    style = {"rotation": 90, "ha": "center", "weight": "bold"}
    canvas.write(x - 3.9, y, f"a window of {page.window} reads only this", 1.15, **style)
    if len(page.definition):
        most = {name: max(read.get(token, 0.0) for token in page.definition) for name, read in page.layers.items()}
        layer = max(most, key=most.get)
        lines = (
            "the answer,",
            f"{asking - page.definition[0]:,} tokens up:",
            layer,
            f"gives {most[layer]:.0%}",
            "to a token",
        )
        line = placed[page.definition[0]][0][0]
        ends = [x + len(text) for parts in placed for y, x, text in parts if line - 2 < y < line + 5 and text.strip()]
        x, y = canvas.at(line, min(max(ends), WIDTH - 4))  # beside the text where it leaves room
        canvas.write(x + 3, y + 1.5, "\n".join(lines), 1.15, weight="bold")
    line, column, text = placed[asking][-1]
    x, y = canvas.at(line, column + len(text))
    canvas.write(x + 1.5, y, "\n".join(page.answer), 1.15, weight="bold")


def header(canvas: Canvas, page: Page) -> None:
    tokens = f"{len(page.pieces):,}"
    title = f"To tell the next token, each layer of DSA reads {page.window} of the {tokens} tokens on this page"
    canvas.write(0, -3.1, title, 1.7, weight="bold", family="DejaVu Sans")
    x = 0.0
    for (name, held), color in zip(page.held.items(), COLORS, strict=False):
        canvas.box(x, -2.0, 3, 0.9, color=color, alpha=0.6)
        text = f"{name} ({held:.0%} of its attention)"
        canvas.write(x + 4, -1.55, text)
        x += len(text) + 7
    canvas.write(x, -1.55, "read by no layer", color=FAINT)
    canvas.box(x + 19, -2.1, 3, 1.1, fill=False, linewidth=2.2, edgecolor=INK)
    canvas.write(x + 23, -1.55, "the answer")
