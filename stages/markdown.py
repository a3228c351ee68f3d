"""Pages in Markdown, on which what the project did not write is text and nothing else.

Samples of data and models, names and addresses may hold anything: a fence, a bar, a tag. So every string that a
template prints is escaped, but for what macros, `code`, `block` and `safe` give.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

# In a paragraph or in a cell of a table; an underscore within a word is none
ACTIVE = re.compile(r"[\\`*\[\]<>|~&$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")


def visible(text: str, *, lines: bool = False) -> str:
    """Text that shows what is in it: control characters as escapes. lines: line breaks and tabs stay."""
    keep = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def ticks(text: str, least: int) -> str:
    """Backticks enough to enclose a text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def code(text: str) -> Markup:
    """A text as a code span that may stand in a cell of a table: line breaks are shown, bars escaped."""
    text = visible(text.replace("\n", "⏎"))
    text = text.replace("\\|", "∖|").replace("|", "\\|")  # readers disagree on a bar after two backslashes
    fence, pad = ticks(text, 1), " " if text.strip() and {text[0], text[-1]} & {"`", " "} else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}" if text else "(nothing)")


def block(text: str, language: str = "text") -> Markup:
    """A text as a fenced block."""
    text = visible(text, lines=True)
    fence = ticks(text, 3)
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def escape(value):
    """A string as text within a line of Markdown; all else as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return Markup(ACTIVE.sub(r"\\\g<0>", visible(value.replace("\n", " "))))


NBSP = "\u00a0"  # a number, its error and its unit stay on one line


def number(x: float | None, digits: int = 4, sign: bool = False, times: float = 1) -> Markup:
    """A dash where there is none, None or NaN."""
    return Markup("–" if x is None or x != x else f"{round(times * x, digits) + 0.0:{'+' if sign else ''},.{digits}f}")


def with_interval(pair: Sequence[float | None], digits: int = 4, sign: bool = True, times: float = 1) -> Markup:
    """A mean and half of its 95 % interval: +0.0016 ± 0.0018."""
    return Markup(f"{number(pair[0], digits, sign, times)}{NBSP}±{NBSP}{number(pair[1], digits, times=times)}")


def percent(x: float | Sequence[float | None], digits: int = 1) -> Markup:
    """A share, or one with half of its 95 % interval."""
    text = number(x, digits, times=100) if isinstance(x, (int, float)) else with_interval(x, digits, False, 100)
    return Markup(f"{text}{NBSP}%")


def amount(n: int, one: str, many: str | None = None) -> Markup:
    """1 row, 1,234 rows."""
    return Markup(f"{n:,}{NBSP}{one if n == 1 else many or one + 's'}")


FILTERS = {
    "code": code,
    "block": block,
    "number": number,
    "with_interval": with_interval,
    "percent": percent,
    "amount": amount,
}


def load(template: Path, **filters: Callable) -> Template:
    """A template; a name that is missing in its context is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | filters
    environment.globals["zip"] = zip
    return environment.get_template(template.name)


def page(template: Path, context: dict, **filters: Callable) -> str:
    """A template's text."""
    return load(template, **filters).render(context)
