#!/usr/bin/env bash
# PyLate 1.6.0: CachedContrastive returns Contrastive's loss and leaves the batch size times its gradients. Each chunk's
# backward runs on a sum, and the division by the batch (size_average=True, the default) comes after it, for the value alone.
# So size_average changes nothing that trains, clipping of gradients bites N times earlier, and SGD's step is N times as
# long: a mini_batch_size that only saves memory, by its description, changes the training.
# Seen: loss equal to 1e-6 at N = 8 and 32, gradients 8.0 and 32.0 times as large; the same with size_average=False.
# Exits 0 while this holds.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/pip" install --quiet --disable-pip-version-check "$@" 2>/dev/null; }
pip torch==2.13.0 numpy==2.4.6 sentence-transformers==5.3.0 transformers==5.3.0 datasets==4.8.4 accelerate==1.15.0
pip --no-deps pylate==1.6.0
"$work/env/bin/python" - <<'P'
from importlib.metadata import version

import torch
from pylate import losses
from torch import nn


class Encoder(nn.Module):
    """Token embeddings of given vectors, as a ColBERT model gives them."""

    do_query_expansion, skiplist = True, []

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, features):
        return {"token_embeddings": self.layer(features["given"])}


def run(kind, n, **words):
    torch.manual_seed(0)
    encoder = Encoder()
    tokens = {"input_ids": torch.zeros(n, 4, dtype=torch.long), "attention_mask": torch.ones(n, 4)}
    loss = kind(encoder, **words)([{"given": torch.randn(n, 4, 8), **tokens} for _ in range(2)])
    loss.backward()
    return loss.item(), encoder.layer.weight.grad


print("pylate", version("pylate"), "sentence-transformers", version("sentence-transformers"), "torch", torch.__version__)
for n in (8, 32):
    (plain, a), (cached, b) = run(losses.Contrastive, n), run(losses.CachedContrastive, n, mini_batch_size=4)
    _, c = run(losses.CachedContrastive, n, mini_batch_size=4, size_average=False)
    ratio = (b.norm() / a.norm()).item()
    print(f"N {n}: losses {plain:.5f} and {cached:.5f}, gradients {ratio:.3f} times as large; size_average moves them: {not torch.equal(b, c)}")
    assert abs(plain - cached) < 1e-4, "the losses differ"
    assert torch.allclose(b, n * a, rtol=1e-3, atol=1e-4) and torch.equal(b, c), "the behaviour has changed"
P
