"""What the model of a GPU's times counts."""

from __future__ import annotations

import pytest

from bench.gpu import model, problems


def test_the_model_counts_what_each_loss_does():
    """Two-sided statistics: four GEMMs, two passes; a queue: two GEMMs; and never below the bound."""
    by_label = {problem.label: problem for problem in problems.TABLE}
    clip = by_label["CLIP 32,768², D 512"]
    score_ps = 4 * 2 * 512 / (0.92 * 790) + 2 * 1.5
    assert model.cuda_ms(clip) == pytest.approx(0.030 + clip.scores * score_ps * 1e-9)
    assert model.bound_ms(problems.MOCO) == pytest.approx(2 * 2 * 256 * 65536 * 128 / 790e12 * 1e3)
    assert all(min(model.cuda_ms(p), model.triton_ms(p)) > model.bound_ms(p) for p in problems.TABLE)
    assert "**Modelled, not measured**" in model.table()
