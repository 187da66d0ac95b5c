// Whose positives are whose: rows and columns with the same id. By arithmetic, from targets, or as the ranks of labels,
// since the kernels compare 32-bit ids and labels may be any int64.
#pragma once

#include <algorithm>

#include "../problem.h"

namespace fused_nce {

class Ids {
 public:
  // `labels` (N) and `ranks` (M) are room for those of a layout by labels, else null.
  Ids(const SweepInputs& in, int64_t* labels, int32_t* ranks)
      : scoring_(in.scoring), layout_(in.layout), n_(in.q.size(0)), m_(in.k.size(0)), labels_(labels), ranks_(ranks) {
    if (!ranks_) return;
    std::copy_n(of_rows(), n_, labels_);
    std::sort(labels_, labels_ + n_);
    const int64_t* columns = layout_.column_ids.const_data_ptr<int64_t>();
    for (int64_t j = 0; j < m_; ++j) {
      const int32_t rank = rank_of(columns[j]);
      ranks_[j] = rank < n_ && labels_[rank] == columns[j] ? rank : -2;  // no row's, not even padding's
    }
  }

  bool drop_itself() const { return layout_.itself >= 0; }

  // Of rows first .. first + count - 1: `ids`, -1 where no column is a positive, and the column that each is.
  void name_rows(int64_t first, int64_t count, int32_t* ids, int32_t* itself) const {
    for (int64_t l = 0; l < count; ++l) {
      const int64_t i = first + l;
      if (ranks_) ids[l] = rank_of(of_rows()[i]);
      else if (layout_.row_ids.defined()) ids[l] = static_cast<int32_t>(of_rows()[i]);
      else if (layout_.positives.defined() || layout_.by_marks) ids[l] = -1;
      // fault: kernels-offset-ignored
      else ids[l] = static_cast<int32_t>(i / scoring_.rows_per_image + scoring_.offset);
      itself[l] = drop_itself() ? static_cast<int32_t>(i + layout_.itself) : -1;
    }
  }

  // Of columns first .. first + count - 1, in `buffer` or where they lie already.
  const int32_t* name_columns(int64_t first, int64_t count, int32_t* buffer) const {
    if (ranks_) return ranks_ + first;
    int64_t image = first / scoring_.n_c, location = first % scoring_.n_c;
    for (int64_t c = 0; c < count; ++c) {
      buffer[c] = static_cast<int32_t>(image);
      if (++location == scoring_.n_c) {
        location = 0;
        ++image;
      }
    }
    return buffer;
  }

  // The row that each column is, -1 where it is none.
  void rows_of_columns(int64_t first, int64_t count, int32_t* rows) const {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t row = first + c - layout_.itself;
      rows[c] = row >= 0 && row < n_ ? static_cast<int32_t>(row) : -1;
    }
  }

 private:
  const int64_t* of_rows() const { return layout_.row_ids.const_data_ptr<int64_t>(); }
  int32_t rank_of(int64_t label) const {
    return static_cast<int32_t>(std::lower_bound(labels_, labels_ + n_, label) - labels_);
  }

  const Scoring scoring_;
  const Layout& layout_;
  const int64_t n_, m_;
  int64_t* const labels_;
  int32_t* const ranks_;
};

}  // namespace fused_nce
