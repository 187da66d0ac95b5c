"""The faults, as data: what is replaced by what, and the bug that it stands for.

Half of them are invisible on tidy inputs (64 × 256, D = 64, N(0,1), upstream 1). `find` must occur exactly once.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One planted fault."""

    reason: str  # the mistake that it stands for
    file: str  # from the project's root
    find: str
    replace: str
    tests: tuple[str, ...] = ()  # that must notice it; the engine's quick tests if empty


ATOMS, STATISTICS, TAILS, OPS, ENGINE = (
    f"fused_nce/core/{name}.py" for name in ("atoms", "statistics", "tails", "ops", "engine")
)
CHUNKED, DISPATCH, AMDIM = "fused_nce/backends/chunked.py", "fused_nce/core/dispatch.py", "fused_nce/losses/amdim.py"
CPU, TILES, REFERENCE = (f"fused_nce/backends/{name}.py" for name in ("cpu", "tiles", "reference"))
QUEUE = "fused_nce/losses/queue.py"

PYTHON = (
    # ---- formulas
    Fault(
        "softplus linear from 20 on",
        STATISTICS,
        "return -torch.nn.functional.logsigmoid(-z)",
        "return torch.nn.functional.softplus(z)",
    ),
    Fault(
        "reference: NaN hidden by clip or max",
        STATISTICS,
        "return s.sum(dim=dim) * 0",
        "return torch.zeros_like(s.sum(dim=dim))",
    ),
    Fault(
        "reference: clip's slope missing",
        REFERENCE,
        "w = on_t * atoms.transform_slope(spec.transform, x.t) + on_s",
        "w = on_t + on_s",
    ),
    Fault(
        "reference: siblings in the denominator",
        STATISTICS,
        "self.fold(scores.masked_fill(~getattr(x.of, self.over), self.empty), dim)",
        "self.fold(scores, dim)",
    ),
    Fault(
        "reference: siblings weighed as negatives",
        STATISTICS,
        ".masked_fill(~getattr(x.of, self.over), 0.0)",
        "",
    ),
    Fault(
        "offset ignored",
        ATOMS,
        "return index // layout.rows_per_image + offset",
        "return index // layout.rows_per_image",
    ),
    Fault(
        "rows_per_image off by one",
        ATOMS,
        "return index // layout.rows_per_image + offset",
        "return (index + 1) // (layout.rows_per_image + 1) + offset",
    ),
    Fault(
        "penalty after the clip",
        STATISTICS,
        '_sum("square", "s",',
        '_sum("square", "t",',
    ),
    Fault(
        "p − 1 cancels as p → 1",
        TAILS,
        'q = torch.sigmoid(rows[spec.stats.index("neg_lse")][:, None] - pos) * d_element',
        'q = (1 - torch.sigmoid(pos - rows[spec.stats.index("neg_lse")][:, None])) * d_element',
    ),
    Fault(
        "penalty: mean over the positives", TAILS, "(self.penalty / (pos.shape[0] * m))", "(self.penalty / pos.numel())"
    ),
    Fault("penalty's slope: not a mean", TAILS, "d_penalty * (self.penalty / n_scores)", "d_penalty * self.penalty"),
    Fault("λ = 0 times inf is NaN", TAILS, " if self.penalty else torch.zeros_like(total)", ""),
    Fault(
        "sum reduced like mean",
        TAILS,
        'return self.weight if self.reduction == "sum" else self.weight / n_elements',
        "return self.weight / n_elements",
    ),
    Fault(
        "mutual information overstated: chance − nce",
        TAILS,
        "bound = math.log(n_k) - fixed_sum(softplus(lse[:, None] - math.log(n_c) - pos)) / n",
        "bound = math.log1p((n_k - 1) * n_c) - nce",
    ),
    # ---- upstream gradients and the graph
    Fault(
        "upstream gradient ignored",
        OPS,
        "stash = tuple(upstreams.times(g, d_loss) if need else g",
        "stash = tuple(g if need else g",
    ),
    Fault(
        "upstream of row 0 used for all rows",
        OPS,
        "(zero if d_nce is None else d_nce * mean)",
        "(zero if d_nce is None else d_nce.reshape(-1)[0] * mean)",
    ),
    Fault(
        "upstream of the mean not divided",
        OPS,
        "(zero if d_nce is None else d_nce * mean)",
        "(zero if d_nce is None else d_nce)",
    ),
    Fault(
        "λ not scaled by its upstream",
        OPS,
        "d_sum = on_loss + (zero if d_penalty is None else d_penalty)",
        "d_sum = on_loss",
    ),
    Fault(
        "stash scaled in place although the graph is kept",
        "fused_nce/core/upstream.py",
        "if traced or batched(upstream) or torch._C._autograd._get_current_graph_task_keep_graph():",
        "if traced or batched(upstream):",
    ),
    Fault(
        "stash cast to the inputs' dtype before the upstream",
        OPS,
        "return *values, found.pos, found.rows, columns, *gradients",
        "return *values, found.pos, found.rows, columns, *(g.to(x.q.dtype).to(g.dtype) for g in gradients)",
    ),
    Fault(
        "double backward dropped in silence",
        OPS,
        "    if torch.is_grad_enabled():\n        return *_with_graph(ctx, tails",
        "    if False:\n        return *_with_graph(ctx, tails",
    ),
    Fault(
        "double backward along a path between the inputs",
        OPS,
        ".each(lambda y: y.view_as(y))",
        "",
        ("tests/core/test_twice.py",),
    ),
    Fault(
        "double backward of an empty set",
        "fused_nce/core/twice.py",
        "torch.where(some, scores.masked_fill(~inside, stat.empty), 0.0)",
        "scores.masked_fill(~inside, stat.empty)",
        ("tests/core/test_twice.py",),
    ),
    Fault(
        "frozen side pays for a gradient",
        ENGINE,
        "graph and x is not None and _wants_gradient(x)",
        "graph and x is not None",
    ),
    Fault("gradient work under no_grad", ENGINE, "graph = torch.is_grad_enabled()", "graph = True"),
    # ---- the chunk loop
    Fault("dk not accumulated across strips", CHUNKED, "beta=int(rows.start > 0)", "beta=0"),
    Fault("dq not accumulated across panels", CHUNKED, "beta=int(columns.start > 0 or p.shared)", "beta=int(p.shared)"),
    Fault(
        "panels overwrite instead of merge",
        CHUNKED,
        "atoms.merge_tiles(self.p.spec.stats, parts)",
        "parts[-1]",
    ),
    Fault(
        "last panel dropped",
        CHUNKED,
        "range(0, self.p.m, self.plan.panel)",
        "range(0, self.p.m - self.plan.panel + 1, self.plan.panel)",
    ),
    Fault(
        "max shift missing",
        TILES,
        "peak = x.amax(dim=1, keepdim=True) * self.factor if lse",
        "peak = x[:, :1] * 0 if lse",
    ),
    Fault(
        "one shift for all rows",
        TILES,
        "x.amax(dim=1, keepdim=True) * self.factor if lse",
        "(x.amax() * self.factor).expand(x.shape[0], 1) if lse",
    ),
    Fault("clip's slope missing", TILES, "w.addcmul_(w, self.x.square_(), value=-1)", "self.x.square_()"),
    Fault("NaN hidden by clip or max", TILES, ".add_(shift) + bad", ".add_(shift)"),
    Fault(
        "scores through bfloat16",
        TILES,
        "self.r = torch.mm(q, k.T, out=self.buffers[0])",
        "self.r = self.buffers[0].copy_(torch.mm(q, k.T).bfloat16())",
    ),
    Fault(
        "dk rounded to the inputs' dtype after each strip",
        CHUNKED,
        "out.dk[columns].addmm_(w.T, q, beta=int(rows.start > 0))",
        "out.dk[columns].addmm_(w.T, q, beta=int(rows.start > 0)).copy_(out.dk[columns].to(self.p.q.dtype))",
    ),
    Fault(
        "a row without negatives is NaN",
        TILES,
        'self.shift = torch.where(peak == float("-inf"), 0.0, peak)',
        "self.shift = peak",
    ),
    Fault(
        "scale missing in dk",
        CHUNKED,
        "q = p.q[rows].to(self.wide) * (1.0 if p.shared else p.scale)",
        "q = p.q[rows].to(self.wide)",
    ),
    Fault(
        "strided input read as contiguous",
        TILES,
        "problem.q[rows].to(buffers.dtype), problem.k[panel].to(buffers.dtype)",
        "problem.q[rows].to(buffers.dtype), "
        "problem.k.as_strided(problem.k.shape, (problem.k.shape[1], 1))[panel].to(buffers.dtype)",
    ),
    Fault(
        "positives not dropped from the negatives",
        TILES,
        'self.own.put(x, x.new_full((), float("-inf")))',
        "pass",
    ),
    # ---- around the kernels
    Fault(
        "cpu: statistics in another order",
        STATISTICS,
        '*("neg_lse", "neg_max", "square"),  #',
        '*("neg_max", "neg_lse", "square"),  #',
    ),
    Fault("strict mode ignored", DISPATCH, 'if os.environ.get("FUSED_NCE_STRICT") == "1":', "if False:"),
    Fault(
        "default scale 1/D",
        AMDIM,
        "1 / math.sqrt(features.shape[-1]) if scale is None",
        "1 / features.shape[-1] if scale is None",
    ),
    Fault(
        "preset with another λ",
        AMDIM,
        '{"scale": None, "clip": 20.0, "penalty": 0.05}',
        '{"scale": None, "clip": 20.0, "penalty": 0.04}',
    ),
    Fault("directions summed, not averaged", AMDIM, "0.5 * len(rows)", "1.0 * len(rows)"),
    # ---- the rest of the vocabulary
    Fault("the row itself among its negatives", ATOMS, "~own & kept, kept)", "~own, kept)"),
    Fault("the row itself among its exponentials", TILES, 'self.itself.put(x, x.new_full((), float("-inf")))', "pass"),
    Fault("one tensor in both roles: half the gradient", CHUNKED, "out.dq[columns].addmm_(w.T, q)", "pass"),
    Fault("reference: one tensor in both roles, half the gradient", REFERENCE, "w + w.T if problem.shared else w", "w"),
    Fault("strips' column statistics overwrite", ATOMS, "merge_two(self.names, waiting, part), None", "part, None"),
    Fault("both ways summed, not averaged", TAILS, "- pos)) / 2", "- pos))"),
    Fault(
        "an anchor without positives is NaN",
        TAILS,
        'torch.where(found["pos_count"] > 0, value, bad(found["neg_lse"]))[:, None]',
        "value[:, None]",
    ),
    Fault("gradient of the bias dropped", CHUNKED, "out.dbias.add_(part.bias_sum)", "pass"),
    Fault(
        "separate positives without a gradient", OPS, "through if needs[4] else dpositives", "torch.zeros_like(d_pos)"
    ),
    Fault(
        "queue: a batch that overflows is cut",
        QUEUE,
        "self.keys.device)) % self.size",
        "self.keys.device)).clamp(max=self.size - 1)",
    ),
    Fault(
        "one location drawn for the whole batch",
        AMDIM,
        "torch.randint(rows.shape[1], (rows.shape[0],), device=rows.device)",
        "torch.randint(rows.shape[1], (1,), device=rows.device)",
    ),
)

ROWS, STRIP, SWEEP, FORMULAS = "csrc/cpu/rows.inl", "csrc/cpu/strip.cpp", "csrc/cpu/sweep.cpp", "csrc/atoms.h"
IDS = "csrc/cpu/ids.h"

CPP = (
    Fault(
        "kernels: p − 1 cancels", FORMULAS, "return -sigmoid(neg_lse - pos);", "return sigmoid(pos - neg_lse) - 1.0f;"
    ),
    Fault(
        "kernels: clip's slope missing in the negatives",
        FORMULAS,
        "return exp_shifted * inverse * d_lse * slope;",
        "return exp_shifted * inverse * d_lse;",
    ),
    Fault(
        "kernels: offset ignored",
        IDS,
        "i / scoring_.rows_per_image + scoring_.offset",
        "i / scoring_.rows_per_image",
    ),
    Fault("kernels: NaN hidden", STRIP, "log_value(total) + scoring.bias + bad)", "log_value(total) + scoring.bias)"),
    Fault("kernels: dk not accumulated across strips", SWEEP, "strip_.first > 0", "false"),
    Fault("kernels: upstream of row 0 for all rows", STRIP, "? d_neg_lse[i] :", "? d_neg_lse[0] :"),
    Fault(
        "kernels: tail columns dropped",
        ROWS,
        "for (; c < tile.columns; ++c) fold_columns",
        "for (; false; ++c) fold_columns",
    ),
    Fault(
        "kernels: groups summed without their shifts", FORMULAS, "+ b.sum * exp_value(b.shift - out.shift)", "+ b.sum"
    ),
)
