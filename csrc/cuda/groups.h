// The kernels of a row, written once for a group of threads: a CTA on a GPU (cta.h), a loop over its threads in the CPU
// emulation (host.cpp).
//
// A group has `first()`, true for one thread; `barrier()`; `reduce(f, merge)`, which merges f(thread, threads) over all
// threads, for all of them to see, after everything that they wrote before it; and `reduce_warps`, for columns.h.
// Nothing depends on timing: a thread takes fixed columns, reduce merges in a fixed tree, and the partial statistics
// that several groups found of a row are merged by index.
#pragma once

#include "columns.h"
#include "marks.h"
#include "prefixes.h"

namespace fused_nce {
namespace cuda {

// One CTA's share of a row's statistics into its slot.
template <bool kClip, bool kShift, Extras kExtras, class Group>
FUSED_NCE_HD void fold_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t r,
                           int part, int64_t slot) {
  const Row row = row_of(strip, rules, r, part);
  const RowPart found = group.reduce(
      [&](int thread, int threads) { return fold_thread<kClip, kShift, kExtras>(row, rules, rows, thread, threads); },
      MergeParts<kShift>());
  if (group.first()) rows.scratch.partials[(row.index - rows.scratch.first_row) * rows.scratch.slots + slot] = found;
}

// The statistics of a row and, where `tail`, its coefficients of the nce tail.
template <bool kShift, class Group>
FUSED_NCE_HD void finish_tail(Group& group, const Rules& rules, const RowArrays& rows, const RowPart& all, int64_t i,
                              bool tail) {
  if (group.first()) write_statistics<kShift>(all, i, rules, rows);
  if (!tail) return;
  group.barrier();
  const float slopes = group.reduce(
      [&](int thread, int threads) { return tail_thread(rows, i, rules.positives, thread, threads); }, Add());
  if (group.first()) rows.upstream.d_neg_lse[i - rows.upstream.first_row] = -rows.upstream.tail.unit * slopes;
  group.barrier();  // fault: gpu-weights-early
}

// The slots of row i, merged.
template <class Group, class Part, class Merge>
FUSED_NCE_HD Part merge_slots(Group& group, const RowArrays& rows, int64_t i, const Part* partials, const Part& none,
                              const Merge& merge) {
  const Part* slots = partials + (i - rows.scratch.first_row) * rows.scratch.slots;
  return group.reduce(
      [&](int thread, int threads) {
        Part part = none;
        // fault: gpu-only-first
        for (int64_t s = thread; s < rows.scratch.slots; s += threads) part = merge(part, slots[s]);
        return part;
      },
      merge);
}

template <bool kShift, class Group>
FUSED_NCE_HD void finish_row(Group& group, const Rules& rules, const RowArrays& rows, int64_t i, bool tail) {
  const RowPart all = merge_slots(group, rows, i, rows.scratch.partials, no_part(), MergeParts<kShift>());
  finish_tail<kShift>(group, rules, rows, all, i, tail);
}

// One CTA's share of a row's optional statistics into its slot.
template <bool kClip, bool kTotals, Extras kExtras, class Group>
FUSED_NCE_HD void fold_optional_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows,
                                    int64_t r, int part, int64_t slot) {
  const Row row = row_of(strip, rules, r, part);
  const OptionalPart found = group.reduce(
      [&](int thread, int threads) { return optional_thread<kClip, kTotals, kExtras>(row, thread, threads); },
      MergeOptional());
  if (group.first()) rows.optional.partials[(row.index - rows.scratch.first_row) * rows.scratch.slots + slot] = found;
}

// After `finish_row`, whose statistics a tail reads too.
template <class Group>
FUSED_NCE_HD void finish_optional_row(Group& group, const Rules& rules, const RowArrays& rows, int64_t i, bool tail) {
  const OptionalPart all = merge_slots(group, rows, i, rows.optional.partials, no_optional(), MergeOptional());
  if (!group.first()) return;
  write_optional(all, i, rows.optional);
  if (tail) tail_optional(rows, i, rules.positives);
}

// A share of a row from scores to weights, which a `Store` made with `beside` takes. Panels add to dscale and dbias one
// after the other.
template <bool kClip, bool kShift, Extras kExtras, class Store, class Turns, class Group, class... Beside>
FUSED_NCE_HD void weigh_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t r,
                            int part, const Turns& turns, const Beside&... beside) {
  const Row row = row_of(strip, rules, r, part);
  const Store store(strip, r, beside...);
  const Slopes found = group.reduce(
      [&](int thread, int threads) {
        return weigh_thread<kClip, kShift, kExtras>(row, rules, rows, rows.d_scale != nullptr, turns, store, thread,
                                                    threads);
      },
      AddSlopes());
  if (!rows.d_scale || !group.first()) return;
  const auto add = [&](float* sums, float x) {
    float& sum = sums[row.index * rules.ctas_per_row + part];
    sum = strip.first_column > 0 ? sum + x : x;
  };
  add(rows.d_scale, found.scale);
  if (kExtras >= Extras::all && rows.d_bias) add(rows.d_bias, found.bias);
}

// A whole row from scores to statistics to weights, in one go. `memory` is the group's, for `keeps` of them: a thread
// finds there what it has put there, so that no barrier is needed, and a score leaves the strip once.
template <bool kClip, bool kShift, class Store, class Group>
FUSED_NCE_HD void loss_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t r,
                           Four* memory, bool keeps) {
  const Row row = row_of(strip, rules, r, 0);
  const InCta turns = {memory, keeps ? static_cast<int>(strip.stride / kColumns) : 0, nullptr};
  const RowPart all = group.reduce(
      [&](int thread, int threads) {
        return fold_thread<kClip, kShift, Extras::none>(row, rules, rows, thread, threads, turns);
      },
      MergeParts<kShift>());
  finish_tail<kShift>(group, rules, rows, all, row.index, true);
  weigh_row<kClip, kShift, Extras::none, Store>(group, strip, rules, rows, r, 0, turns);
}

}  // namespace cuda
}  // namespace fused_nce
