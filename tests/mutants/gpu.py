"""Faults in the GPU's kernels, as the CPU emulates them: they are found without a GPU."""

from __future__ import annotations

from tests.mutants.faults import Fault

ROWS, GROUPS, SWEEP = "csrc/cuda/rows.h", "csrc/cuda/groups.h", "csrc/cuda/sweep.cpp"
COLUMNS, WEIGHTS, OPTIONAL = (f"csrc/cuda/{name}.h" for name in ("columns", "weights", "optional_stats"))

GPU = (
    Fault("gpu: dk not accumulated across blocks", SWEEP, "shared || first > 0)", "shared)"),
    Fault("gpu: dq not accumulated across panels", SWEEP, "shared || column > 0)", "shared)"),
    Fault("gpu: padding counted", ROWS, "negative[u] = inside && !own;", "negative[u] = !own;"),
    Fault(
        "gpu: parts share columns",
        ROWS,
        "clamp((cta + 1) * share, strip.columns)",
        "clamp(strip.columns, strip.columns)",
    ),
    Fault("gpu: only the first part counts", GROUPS, "s < rows.scratch.slots;", "s < 1;"),
    Fault("gpu: learnable scale left out of the gradients", SWEEP, "if (in_.need_k) out_.dk.mul_(numbers_.scale);", ""),
    Fault(
        "gpu: the row itself is a negative",
        ROWS,
        "negative[u] = inside && !own;",
        "negative[u] = column < row.end && !own;",
    ),
    Fault("gpu: positives beyond the row itself one place too far", ROWS, "column - (column > gap)", "column"),
    Fault(
        "gpu: one report for all sources",
        "csrc/cuda/summary.h",
        "i = turn * s.report_groups + report",
        "i = turn + report * (s.rows / s.report_groups)",
    ),
    Fault("gpu: of problems added up, the last alone", "csrc/cuda/summary.h", "nce += s.weight", "nce = s.weight"),
    Fault("gpu: problems share the places of their statistics", "csrc/cuda/ops.cpp", "    first_row += n;\n", ""),
    Fault("gpu: an index taken for arithmetic", ROWS, "rules.row_ids ? rules.row_ids[out.index] :", ""),
    Fault("gpu: strips of a column summed without their shifts", COLUMNS, "all.sum *= old;", ""),
    Fault("gpu: a column's positives are its negatives", COLUMNS, "inside && !column.own(row)", "inside"),
    Fault("gpu: a column's NaN hidden", COLUMNS, "= log_value(sum) + all.bad;", "= log_value(sum);"),
    Fault(
        "gpu: columns weigh nothing",
        WEIGHTS,
        "if (column_stats) weight += back_weight",
        "if (false) weight += back_weight",
    ),
    Fault("gpu: a label taken for a column", ROWS, "if (kLabels && column_ids) return", "if (false) return"),
    Fault("gpu: a panel's labels from column 0 on", ROWS, "rules.column_ids + strip.first_column", "rules.column_ids"),
    Fault("gpu: the bias left out of the weights", WEIGHTS, "if (kExtras) t.value += row.bias;", ""),
    Fault(
        "gpu: the penalty in the bias's gradient",
        WEIGHTS,
        "slope[u] = inside ? weight",
        "slope[u] = inside ? weight + two_d_square * s",
    ),
    Fault(
        "gpu: parts of the positives summed without their shifts",
        OPTIONAL,
        "merge(LogSum<float>{shift_of(a.max), a.sum}, LogSum<float>{shift_of(b.max), b.sum}).sum",
        "a.sum + b.sum",
    ),
    Fault("gpu: a lone positive has a gap", OPTIONAL, "count > 1.0f ? unit", "count > 0.0f ? unit"),
    Fault("gpu: the softplus of what is no number hidden", OPTIONAL, "= all.softplus + all.bad;", "= all.softplus;"),
    Fault("gpu: an infinite score looks sound", OPTIONAL, "= unit + nan_of(optional.of(kNegSoftplus, i));", "= unit;"),
)
