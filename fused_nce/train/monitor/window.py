"""What a line of the log says of the time since the line before: images, waiting for data, the rate of products."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class Window:
    """From a line of the log to the next, of this process.

    Args:
        flop: of the products of one pass, forward and backward, by the shape of its first view, None where unknown: see
            `rehearsal`.
    """

    def __init__(self, flop: Mapping[tuple[int, ...], int | None]) -> None:
        self._flop_of = flop
        self.open(0)

    def open(self, step: int) -> None:
        """Begin anew at an update."""
        self.step, self._since, self._waited_s, self._images = step, time.perf_counter(), 0.0, 0
        self._flop: int | None = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what blocks until the next batch is there."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - start

    def passed(self, shape: Sequence[int]) -> None:
        """After a pass over a first view of this shape, a row an image."""
        found = self._flop_of.get(tuple(shape))
        self._flop = None if found is None or self._flop is None else self._flop + found
        self._images += shape[0]

    def facts(self, processes: int) -> dict[str, float | None]:
        """For the log: rates of all processes together, and this one's share of waiting."""
        seconds = time.perf_counter() - self._since
        rate = None if self._flop is None else float(f"{processes * self._flop / seconds / 1e9:.5g}")
        return {
            "images_per_s": round(processes * self._images / seconds, 2),
            "data_wait_share": round(self._waited_s / seconds, 5),  # fault: wait-not-shared
            "matrix_gflop_per_s": rate,
        }
