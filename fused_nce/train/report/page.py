"""HTML pages that open offline: templates beside this file, which escape every value that is not `Markup`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


class Card(NamedTuple):
    """A framed chart."""

    title: str
    body: Markup


class Row(NamedTuple):
    """A line of a table; the first cell is its name. One cell alone is a heading over the lines below it."""

    cells: Sequence[str]
    ours: bool = False  # in the colour of the trained encoder, or of the fused loss


class Table(NamedTuple):
    """A table, drawn where it has rows."""

    head: Sequence[str]
    rows: Sequence[Row]


def small(before: str, text: str = "") -> Markup:
    """`before`, and `text` in small letters behind it."""
    return Markup("{}<small>{}</small>").format(before, text)


def fill(template: str, **fields: object) -> str:
    """The page of a template beside this file."""
    return PAGES.get_template(template).render(fields)
