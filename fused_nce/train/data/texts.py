"""Many texts in two objects: readers that were forked look at a million names, and copy no page for it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence


class Texts(Sequence[str]):
    """Texts in one piece of memory, and where each ends: their UTF-8 and 8 bytes each.

    A list of them takes some 60 bytes more each. And whoever looks at a Python object writes to its count of
    references: a forked process then has the page to itself, and in the end the whole list.

    Args:
        texts: to begin with.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._whole, self._ends = bytearray(), array("q")
        for text in texts:
            self.append(text)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # one at a time
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._whole[start : self._ends[index]].decode("utf-8", "surrogatepass")

    def append(self, text: str) -> None:
        """Add one. A name of a file may hold lone surrogates, for bytes that are no UTF-8."""
        self._whole += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._whole))
