"""Draws from a seed, after which the generators are as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's generator starts from a seed. `torch.manual_seed` would start the GPUs' anew too, which stay so."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # fault: every-device-seeded
        yield
