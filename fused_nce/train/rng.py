"""The state of every random generator as plain JSON, since pickle is never read."""

import random
from typing import Any

import numpy
import torch


def capture() -> dict[str, Any]:
    """Torch (CPU and CUDA), Python and NumPy, of this process."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = numpy.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
        "python": [version, list(words), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(place), int(has_gauss), float(cached)],
    }


def restore(state: dict[str, Any]) -> None:
    """The inverse of `capture`."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(text) for text in state["cuda"]])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), place, has_gauss, cached))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
