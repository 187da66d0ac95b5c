// What a group of threads does to the row that it shares. The text is the same on a GPU, where a group is a CTA, and on
// a CPU, where a loop plays its threads one after the other.
//
// A group has `first()`, true for one thread; `meet()`, a barrier; `gather(f, merge)`, which merges f(thread, threads)
// of all threads for all of them to see, after all that they wrote before it; and `across`, for columns.h. Nothing
// depends on timing: a thread takes fixed columns, gather merges in a fixed tree, and parts of a row that several
// groups found, by index.
#pragma once

#include "columns.h"
#include "weights.h"

namespace fused_nce {
namespace cuda {

// A share of a row into its slot.
template <bool kClip, bool kShift, bool kMore, class Group>
FUSED_NCE_HD void fold_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t r,
                           int part, int64_t slot) {
  const Row row = row_of(strip, rules, r, part);
  const RowPart found = group.gather(
      [&](int thread, int threads) { return fold_thread<kClip, kShift, kMore>(row, rules, rows, thread, threads); },
      MergeParts<kShift>());
  if (group.first()) rows.partials[(row.index - rows.block_first) * rows.slots + slot] = found;
}

// The statistics of a row and, where `tail`, its coefficients of the nce tail.
template <bool kShift, class Group>
FUSED_NCE_HD void finish_tail(Group& group, const Rules& rules, const RowArrays& rows, const RowPart& all, int64_t i,
                              bool tail) {
  if (group.first()) write_statistics<kShift>(all, i, rows);
  if (!tail) return;
  group.meet();
  const float slopes = group.gather(
      [&](int thread, int threads) { return tail_thread(rows, i, rules.positives, thread, threads); }, Add());
  if (group.first()) rows.d_neg_lse[i - rows.first_coefficient] = -rows.tail.unit * slopes;
  group.meet();
}

// The slots of row i, merged.
template <class Group, class Part, class Merge>
FUSED_NCE_HD Part merge_slots(Group& group, const RowArrays& rows, int64_t i, const Part* partials, const Part& none,
                              const Merge& merge) {
  const Part* slots = partials + (i - rows.block_first) * rows.slots;
  return group.gather(
      [&](int thread, int threads) {
        Part part = none;
        for (int64_t s = thread; s < rows.slots; s += threads) part = merge(part, slots[s]);
        return part;
      },
      merge);
}

template <bool kShift, class Group>
FUSED_NCE_HD void finish_row(Group& group, const Rules& rules, const RowArrays& rows, int64_t i, bool tail) {
  const RowPart all = merge_slots(group, rows, i, rows.partials, no_part(), MergeParts<kShift>());
  finish_tail<kShift>(group, rules, rows, all, i, tail);
}

// A share of a row's further statistics into its slot.
template <bool kClip, class Group>
FUSED_NCE_HD void fold_further_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows,
                                   int64_t r, int part, int64_t slot) {
  const Row row = row_of(strip, rules, r, part);
  const FurtherPart found = group.gather(
      [&](int thread, int threads) { return further_thread<kClip>(row, thread, threads); }, MergeFurther());
  if (group.first()) rows.further.partials[(row.index - rows.block_first) * rows.slots + slot] = found;
}

// After `finish_row`, whose statistics a tail reads too.
template <class Group>
FUSED_NCE_HD void finish_further_row(Group& group, const Rules& rules, const RowArrays& rows, int64_t i, bool tail) {
  const FurtherPart all = merge_slots(group, rows, i, rows.further.partials, no_further(), MergeFurther());
  if (!group.first()) return;
  write_further(all, i, rows.further);
  if (tail) tail_further(rows, i, rules.positives);
}

// A share of a row from scores to weights. Panels add to dscale and dbias one after the other.
template <bool kClip, bool kShift, bool kMore, class Store, class Group>
FUSED_NCE_HD void weigh_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t r,
                            int part) {
  const Row row = row_of(strip, rules, r, part);
  const Store store(strip, r);
  const Slopes found = group.gather(
      [&](int thread, int threads) {
        return weigh_thread<kClip, kShift, kMore>(row, rules, rows, rows.d_scale != nullptr, store, thread, threads);
      },
      AddSlopes());
  if (!rows.d_scale || !group.first()) return;
  const auto add = [&](float* sums, float x) {
    float& sum = sums[row.index * rules.parts + part];
    sum = strip.first_column > 0 ? sum + x : x;
  };
  add(rows.d_scale, found.scale);
  if (kMore && rows.d_bias) add(rows.d_bias, found.bias);
}

// A whole row from scores to statistics to weights, in one go.
template <bool kClip, bool kShift, class Store, class Group>
FUSED_NCE_HD void loss_row(Group& group, const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t r) {
  const Row row = row_of(strip, rules, r, 0);
  const RowPart all = group.gather(
      [&](int thread, int threads) { return fold_thread<kClip, kShift, false>(row, rules, rows, thread, threads); },
      MergeParts<kShift>());
  finish_tail<kShift>(group, rules, rows, all, row.index, true);
  weigh_row<kClip, kShift, false, Store>(group, strip, rules, rows, r, 0);
}

}  // namespace cuda
}  // namespace fused_nce
