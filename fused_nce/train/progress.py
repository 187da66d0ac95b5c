"""Progress bars: lively on a terminal; in a log file a line every half minute, and none for less."""

import sys
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 30.0


def bar(*args: Any, **options: Any) -> Any:
    """`tqdm.tqdm(*args, **options)`, updated as often as whoever reads it can use."""
    if not sys.stderr.isatty():
        options |= {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S, "delay": LOG_INTERVAL_S}
    return tqdm(*args, **options)
