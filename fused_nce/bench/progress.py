"""What long commands show while they run."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Progress:
    """A bar where tqdm is installed, else a line a step; nothing where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.bar = total, 0, None

    def __enter__(self) -> Callable[[str], None]:
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=self.total, leave=False, dynamic_ncols=True, bar_format="{percentage:3.0f}% {bar} {desc}"
                )
            except ImportError:
                pass
        return self.tick

    def tick(self, what: str) -> None:
        """One step begins."""
        if self.bar is not None:
            self.bar.set_description_str(what, refresh=False)
            self.bar.update(1)
        elif sys.stderr.isatty():
            self.done += 1
            print(f"[{self.done}/{self.total}] {what}", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
