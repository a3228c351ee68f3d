"""A picture of a talk with a trained model, in a terminal: the first held-out look-up row's text and questions.

    python -m studies.chat_picture models/dsa       # reports/see/chat.png

Which row it is does not depend on what the model answers. DSA and dense attention of the same weights both do.
"""

import argparse
import os
import pty
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from stages.files import read_rows

OUT = Path("reports/see/chat.png")
QUESTIONS, COLUMNS, SIZE, LEAD, MARGIN = 3, 112, 15, 21, 18
COLORS = {"$": "#8fa1b3", ">": "#ffd166", "[": "#8fa1b3", "D": "#7bd88f", "d": "#7cb7ff"}  # by how a line begins
PAPER, INK = "#1e2229", "#e6e6e6"


def look_up(rows: Path, max_chars: int) -> tuple[str, list[str], list[str]]:
    """The text of the first look-up row of at most so many characters, its questions and their answers."""
    for row in read_rows(rows):
        turns = [*row.get("history", []), [row["instruction"], row["output"]]]
        if "lookup" in row.get("type_keyword", []) and len(turns[0][0]) <= max_chars:
            text, first = turns[0][0].rsplit("\n\n", 1)
            return text, [first, *(question for question, _ in turns[1:])], [answer for _, answer in turns]
    raise SystemExit(f"{rows}: no look-up row of at most {max_chars} characters")


def talk(command: list[str], lines: list[str]) -> str:
    """What a terminal shows in which these lines are typed, each when it is asked for."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "999"})
    os.close(theirs)
    said, typed = b"", iter(lines)
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # on Linux: the other end is closed
            break
        if said.endswith(b"\r\n> "):
            os.write(ours, next((f"{line}\n".encode() for line in typed), b"\x04"))
    os.close(ours)
    if process.wait():
        raise SystemExit(said.decode())
    return said.decode().replace("\r", "").strip().removesuffix("\n>").rstrip()


def draw(text: str, path: Path) -> None:
    lines = [
        part for line in text.splitlines() for part in textwrap.wrap(line, COLUMNS, subsequent_indent="  ") or [""]
    ]
    font = ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", SIZE)
    size = round(font.getlength("x") * COLUMNS) + 2 * MARGIN, LEAD * len(lines) + 2 * MARGIN
    picture = Image.new("RGB", size, PAPER)
    pen, color = ImageDraw.Draw(picture), INK
    for i, line in enumerate(lines):
        if not line.startswith("  "):
            named = line.endswith(":") or line[:1] in "$>["
            color = COLORS.get(line[:1], INK) if named else INK
        pen.text((MARGIN, MARGIN + LEAD * i), line, color, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, default=Path("data/long/test.jsonl.gz"))
    parser.add_argument("--max-chars", type=int, default=20_000)
    asked = parser.parse_args()
    text, questions, answers = look_up(asked.rows, asked.max_chars)
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder) / "source.txt"
        context.write_text(text, encoding="utf-8")
        command = ["-m", "dsa.chat", asked.model, "--beside", "--context"]
        said = talk([sys.executable, *command, str(context)], questions[:QUESTIONS])
    draw(f"$ python {' '.join(command)} source.txt\n{said}", OUT)
    print(said, *answers[:QUESTIONS], sep="\n")


if __name__ == "__main__":
    main()
