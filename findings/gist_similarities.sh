#!/usr/bin/env bash
# sentence-transformers 6.2.0: GISTEmbedLoss compares rows with nn.CosineSimilarity on (N, 1, D) against (1, N, D), which
# makes (N, N, D) tensors and keeps several for the backward, where (N, N) similarities are wanted. At N = 1,024 and
# D = 384 one of them is 1.6 GB. The losses beside it in the package take one matrix product of unit rows (util.cos_sim).
# Seen at N = 256, D = 384, whose embeddings are 0.4 MB each: 1,251 MiB for GISTEmbedLoss, 13 times N·N·D·4 bytes (864 MiB
# with torch 2.14.1), and 5 MiB for MultipleNegativesRankingLoss; the same similarities by cos_sim agree to 1e-7.
# Exits 0 while this holds.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 sentence-transformers==6.2.0 2>/dev/null
"$work/env/bin/python" - <<'P'
import resource
from importlib.metadata import version

import torch
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim
from torch import nn

N, D = 256, 384


class Given(nn.Module):
    """Embeddings that are there already."""

    tokenizer = None

    def forward(self, features):
        return {"sentence_embedding": features["embeddings"]}


def step(loss, n):
    columns = [{"embeddings": torch.randn(n, D, requires_grad=True)} for _ in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(columns, None).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


gist = GISTEmbedLoss.__new__(GISTEmbedLoss)  # its constructor wants tokenizers, of models that encode texts
nn.Module.__init__(gist)
vars(gist).update(temperature=0.05, margin=0.0, margin_strategy="absolute", contrast_anchors=True, contrast_positives=True)
vars(gist).update(gather_across_devices=False, must_retokenize=False)
gist.similarity_fct, gist.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()  # the constructor's
gist.model = gist.guide = Given()
ranking = MultipleNegativesRankingLoss(Given())
for loss in (ranking, gist):
    step(loss, 8)
few, many = step(ranking, N), step(gist, N)
one = N * N * D * 4 / 2**20
a, b = torch.randn(N, D), torch.randn(N, D)
apart = (gist.sim_matrix(a, b) - cos_sim(a, b)).abs().max().item()
print("sentence-transformers", version("sentence-transformers"), "torch", torch.__version__)
print(f"N {N}, D {D}: ranking {few:.0f} MiB, GIST {many:.0f} MiB = {many / one:.1f} tensors (N, N, D); cos_sim differs by {apart:.0e}")
assert many > 4 * one and few < one and apart < 1e-5, "the behaviour has changed"
P
