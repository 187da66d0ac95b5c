"""HTML pages that open offline: a template beside this file, and the style that all of them share."""

from pathlib import Path
from string import Template

HERE = Path(__file__).parent


def fill(template: str, **fields: str) -> str:
    """The page.

    Args:
        template: a file beside this one.
        fields: HTML by placeholder; `style` is added.
    """
    text = (HERE / template).read_text(encoding="utf-8")
    return Template(text).substitute(fields, style=(HERE / "page.css").read_text(encoding="utf-8"))


def table(
    head: list[str],
    rows: list[list[str]],
) -> str:
    """A table of HTML cells; the first of a row is its name. A row of one cell is a heading over those below it."""
    body = "".join(
        f'<tr class="group"><td colspan="{len(head)}">{row[0]}</td></tr>'
        if len(row) == 1
        else "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table>"
