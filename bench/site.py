"""MkDocs' hook (`mkdocs.yml`): pages that are made from other files of the project, so that nothing is written twice.

The home page is the README; each library of `docs/migrating.md` and each notebook is a page of its own; what documents
link to outside `docs/` comes along.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def sections() -> dict[str, str]:
    """Library → its part of `docs/migrating.md`: those that show a diff."""
    text = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return {title: body for title, body in parts if "```diff" in body}


def slug(title: str) -> str:
    """A page's file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def from_notebook(path: Path) -> str:
    """A notebook's cells as Markdown, with what they printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        printed = "".join("".join(output.get("text", ())) for output in cell.get("outputs", ()))
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join(parts) + f"\n\n[Download the notebook]({path.name})\n"


def made() -> dict[str, str]:
    """Page → Markdown, of the pages that have no file in `docs/`."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    about = "[What holds for all libraries](../migrating.md): checking on your own batch, patching, known differences."
    for title, body in sections().items():
        inside = LINK.sub(lambda found: f"](../{found[1]})", body).strip()
        pages[f"dropin/{slug(title)}.md"] = f"# From {title}\n\n{inside}\n\n{about}\n"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = from_notebook(path)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The two lists that follow from files."""
    groups: dict[str, Any] = {name: entries for group in config.nav or () for name, entries in group.items()}
    groups["Drop in"] += ["migrating.md", *({title: f"dropin/{slug(title)}.md"} for title in sections())]
    groups["Notebooks"] += [f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Made pages, and what the documents link to."""
    for page, text in made().items():
        files.append(File.generated(config, page, content=text))
    for path in [*(ROOT / "bench/results").glob("*.png"), *(ROOT / "notebooks").glob("*.ipynb")]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site: from the root of the project into `docs`, and out of it."""
    name = page.file.src_uri

    def inside(match: re.Match[str]) -> str:
        target = match[1]
        target = target.removeprefix("docs/") if name in PAGES.values() else target
        target = target.removeprefix("../") if "/" not in name else target
        file, hash_, anchor = target.partition("#")
        return f"]({PAGES.get(file, file)}{hash_}{anchor})"

    return LINK.sub(inside, re.sub(r"^(```\w+) no-run$", r"\1", markdown, flags=re.M))
