"""A page in Markdown as one HTML file: its figures inside, a table of contents, and readable on a phone."""

import base64
import re
from itertools import pairwise
from pathlib import Path

import markdown_it
from jinja2 import Environment, FileSystemLoader

FIGURE = re.compile(r"<p>(<img[^>]*>)</p>(?:\s*<p><em>(.*?)</em></p>)?", re.DOTALL)


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def to_html(markdown: str, folder: Path) -> str:
    """The page; of the images those under `folder` are taken in, and an emphasised paragraph below one is its caption.

    HTML in the text stays what it is: stages/markdown.py escapes what the project did not write.
    """
    renderer = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens, contents = renderer.parse(markdown), []
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open" and heading.tag == "h2":
            heading.attrSet("id", anchor(inline.content))
            contents.append((anchor(inline.content), inline.content))
    body = renderer.renderer.render(tokens, renderer.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def figure(match: re.Match) -> str:
        caption = f"<figcaption>{match[2]}</figcaption>" if match[2] else ""
        return f'<figure><div class="wide">{match[1]}</div>{caption}</figure>'

    def inline_image(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="(figures/[^"]+)"', inline_image, FIGURE.sub(figure, body))
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    title = next(inline.content for heading, inline in pairwise(tokens) if heading.type == "heading_open")
    return templates.get_template("page.html.jinja").render(title=title, contents=contents, body=body)
