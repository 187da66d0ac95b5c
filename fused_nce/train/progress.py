"""Progress bars: lively on a terminal, a line every half minute in a log file."""

import sys
from typing import Any

from tqdm import tqdm


def bar(*args: Any, **options: Any) -> Any:
    """`tqdm.tqdm(*args, **options)`, updated as often as whoever reads it can use."""
    interval_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(*args, mininterval=interval_s, maxinterval=max(10.0, interval_s), **options)
