"""What a reader read, and what it left out and why: one line."""

from __future__ import annotations

from fused_nce.train.files import printable


class Account:
    """Counts what a reader leaves out, by kind, and remembers the first of each."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def leave_out(self, kind: str, name: str, count: int = 1) -> None:
        """Count what is not read.

        Args:
            kind: such as "hidden files".
            name: of one of them; the first of a kind is shown.
            count: how many.
        """
        before, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = before + count, first

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind} ({printable(first)})" for kind, (count, first) in self.kinds.items())

    def aside(self) -> str:
        """In brackets, for the end of an error; nothing where nothing was left out."""
        return f" (left out: {self})" if self.kinds else ""

    def line(self, data: str, split: str, *parts: str) -> str:
        """`shots, train: 9 images, 3 classes; left out: 4 .txt files (notes.txt)`, of the parts that are not empty."""
        left_out = f"; left out: {self}" if self.kinds else ""
        return f"{printable(data)}, {split}: {', '.join(part for part in parts if part)}{left_out}"


def some(count: int, what: str) -> str:
    """`3 images`, or nothing for none."""
    return f"{count:,} {what}" if count else ""
