// Where a score counts for its row and for its column, both in one pass. Part of rows.inl.

// What one score adds to the sums of its row and of its column; nothing to those of the set that it is not of.
struct Share {
  float negative, negative_top, positive, positive_top, total, square;
  int count;
};

// Folds kLines columns at once, whose Kahan steps and accumulators of rows are shared, as in `fold_columns`. The scores
// are finite and their exponentials need no shift. Sums of a column over the lanes of a tile are the compiler's, lane
// by lane of a register; what they are added to is a Kahan sum, as everywhere.
template <bool kColumns, bool kItself, bool kPositives, bool kSquare, int kLines>
inline void fold_lines(const Tile& tile, int64_t first, float scale, const Accumulators& row,
                       const Accumulators* column) {
  const int rows = static_cast<int>(tile.rows);
  const float* __restrict scores = tile.scores + first * tile.lanes;
  const int64_t next = kLines > 1 ? tile.lanes : 0;
  float* __restrict max = row.negatives.max;
  float* __restrict sum = row.negatives.sum;
  float* __restrict error = row.negatives.error;
  float* __restrict square = row.square;
  float* __restrict square_error = row.square_error;
  float* __restrict positive_max = row.positives.max;
  float* __restrict positive = row.positives.sum;
  float* __restrict positive_error = row.positives.error;
  float* __restrict total = row.total;
  float* __restrict total_error = row.total_error;
  int* __restrict count = row.count;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  const int i0 = tile.line_ids[first], i1 = tile.line_ids[first + kLines - 1];
  const int index = static_cast<int>(tile.first_column + first);
  const Share none = {0.0f, -infinity(), 0.0f, -infinity(), 0.0f, 0.0f, 0};
  Share x = none, y = none;
  float x_sum = 0.0f, y_sum = 0.0f, x_max = -infinity(), y_max = -infinity(), x_square = 0.0f, y_square = 0.0f;
  float x_positive = 0.0f, y_positive = 0.0f, x_top = -infinity(), y_top = -infinity(), x_total = 0.0f, y_total = 0.0f;
  int x_count = 0, y_count = 0;
#pragma omp simd reduction(+ : x_sum, y_sum, x_square, y_square, x_positive, y_positive, x_total, y_total, x_count, \
                               y_count) reduction(max : x_max, y_max, x_top, y_top)
  for (int l = 0; l < rows; ++l) {
    const auto share = [&](float score, int id, int its_index) __attribute__((always_inline)) {
      const float s = score * scale, e = exp_bounded(s);
      const bool own = ids[l] == id, out = kItself && itself[l] == its_index;
      Share found;
      found.negative = own || out ? 0.0f : e;
      found.negative_top = own || out ? -infinity() : s;
      found.positive = own && !out ? e : 0.0f;
      found.positive_top = own && !out ? s : -infinity();
      found.total = own && !out ? s : 0.0f;
      found.count = own && !out;
      found.square = out ? 0.0f : s * s;
      return found;
    };
    const Share a = share(scores[l], i0, index), b = kLines > 1 ? share(scores[next + l], i1, index + 1) : none;
    const float top = a.negative_top > b.negative_top ? a.negative_top : b.negative_top;
    add_exactly(sum[l], error[l], a.negative + b.negative);
    max[l] = top > max[l] ? top : max[l];
    if (kSquare) add_exactly(square[l], square_error[l], a.square + b.square);
    if (kPositives) {
      const float high = a.positive_top > b.positive_top ? a.positive_top : b.positive_top;
      add_exactly(positive[l], positive_error[l], a.positive + b.positive);
      add_exactly(total[l], total_error[l], a.total + b.total);
      count[l] += a.count + b.count;
      positive_max[l] = high > positive_max[l] ? high : positive_max[l];
    }
    if (kColumns) {
      x_sum += a.negative;
      y_sum += b.negative;
      x_max = a.negative_top > x_max ? a.negative_top : x_max;
      y_max = b.negative_top > y_max ? b.negative_top : y_max;
      if (kSquare) x_square += a.square;
      if (kSquare) y_square += b.square;
    }
    if (kColumns && kPositives) {
      x_positive += a.positive;
      y_positive += b.positive;
      x_total += a.total;
      y_total += b.total;
      x_count += a.count;
      y_count += b.count;
      x_top = a.positive_top > x_top ? a.positive_top : x_top;
      y_top = b.positive_top > y_top ? b.positive_top : y_top;
    }
  }
  if (!kColumns) return;
  x = {x_sum, x_max, x_positive, x_top, x_total, x_square, x_count};
  y = {y_sum, y_max, y_positive, y_top, y_total, y_square, y_count};
  for (int line = 0; line < kLines; ++line) {
    const Share& found = line ? y : x;
    const int64_t c = first + line;
    add_exactly(column->negatives.sum[c], column->negatives.error[c], found.negative);
    if (found.negative_top > column->negatives.max[c]) column->negatives.max[c] = found.negative_top;
    if (kSquare) add_exactly(column->square[c], column->square_error[c], found.square);
    if (!kPositives) continue;
    add_exactly(column->positives.sum[c], column->positives.error[c], found.positive);
    add_exactly(column->total[c], column->total_error[c], found.total);
    column->count[c] += found.count;
    if (found.positive_top > column->positives.max[c]) column->positives.max[c] = found.positive_top;
  }
}

template <bool kColumns, bool kItself, bool kPositives, bool kSquare>
void fold_both_tile(const Tile& tile, const Scoring& scoring, const Accumulators& rows, const Accumulators* columns) {
  int64_t c = 0;
  for (; c + 2 <= tile.columns; c += 2)
    fold_lines<kColumns, kItself, kPositives, kSquare, 2>(tile, c, scoring.scale, rows, columns);
  // fault: both-odd-column
  if (c < tile.columns) fold_lines<kColumns, kItself, kPositives, kSquare, 1>(tile, c, scoring.scale, rows, columns);
}

template <bool kColumns, bool kItself>
void fold_both_as(const Tile& tile, const Scoring& scoring, bool square, const Accumulators& rows,
                  const Accumulators* columns) {
  const auto fold = rows.count && square ? &fold_both_tile<kColumns, kItself, true, true>
                    : rows.count         ? &fold_both_tile<kColumns, kItself, true, false>
                    : square             ? &fold_both_tile<kColumns, kItself, false, true>
                                         : &fold_both_tile<kColumns, kItself, false, false>;
  fold(tile, scoring, rows, columns);
}

void fold_both(const Tile& tile, const Scoring& scoring, bool square, const Accumulators& rows,
               const Accumulators* columns) {
  // Columns that are summed are no rows of the tile.
  if (columns) fold_both_as<true, false>(tile, scoring, square, rows, columns);
  else if (tile.itself) fold_both_as<false, true>(tile, scoring, square, rows, nullptr);
  else fold_both_as<false, false>(tile, scoring, square, rows, nullptr);
}

template <bool kClip, bool kShift, bool kItself, bool kPositives, class Out>
void weigh_both_tile(const Tile& tile, const Scoring& scoring, const TwoSided& of, typename Out::Element* out,
                     float* d_scale) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  const float unit = of.unit, on_s = of.square;
  const float* __restrict shift = of.rows.shift;
  const float* __restrict negative = of.rows.negative;
  const float* __restrict pos_shift = of.rows.pos_shift;
  const float* __restrict positive = of.rows.positive;
  const float* __restrict constant = of.rows.constant;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  float* __restrict sum = d_scale;
  Location location(tile, scoring);
  for (int64_t c = 0; c < tile.columns; ++c, location.next()) {
    const float* scores = tile.scores + c * tile.lanes;  // and `to` may be the same
    typename Out::Element* to = out + c * tile.lanes;
    const float* __restrict d_pos = kPositives ? nullptr : of.d_pos + location() * tile.lanes;
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
    const float c_shift = of.columns.shift[c], c_negative = of.columns.negative[c];
    const float c_pos_shift = kPositives ? of.columns.pos_shift[c] : 0.0f;
    const float c_positive = kPositives ? of.columns.positive[c] : 0.0f;
    const float c_constant = kPositives ? of.columns.constant[c] : 0.0f;
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float r = scores[l], s = r * f.scale;
      const Score t = transform<kClip>(s, f.clip, f.inverse_clip);
      const bool own = ids[l] == id;
      const float there = kPositives && own ? positive[l] : negative[l];
      const float back = kPositives && own ? c_positive : c_negative;
      float weight;
      if (kShift) {
        const float here = kPositives && own ? pos_shift[l] : shift[l];
        const float away = kPositives && own ? c_pos_shift : c_shift;
        weight = exp_value(t.value - here) * there + exp_value(t.value - away) * back;
      } else {
        // fault: both-row-twice
        weight = exp_bounded(t.value) * (there + back);
      }
      if (kPositives) weight += own ? constant[l] + c_constant : 0.0f;
      else weight = own ? d_pos[l] : weight;
      weight = unit * weight * t.slope + on_s * s;
      if (kItself) weight = itself[l] == index ? 0.0f : weight;
      sum[l] += weight * r;
      to[l] = Out::of(f.scale * weight);
    }
  }
}

template <bool kItself, bool kPositives, class Out>
void weigh_both_as(const Tile& tile, const Scoring& scoring, const TwoSided& of, typename Out::Element* out,
                   float* d_scale) {
  const bool clip = scoring.clip > 0.0f;
  const auto weigh = clip && scoring.no_shift ? &weigh_both_tile<true, false, kItself, kPositives, Out>
                     : clip                   ? &weigh_both_tile<true, true, kItself, kPositives, Out>
                     : scoring.no_shift       ? &weigh_both_tile<false, false, kItself, kPositives, Out>
                                              : &weigh_both_tile<false, true, kItself, kPositives, Out>;
  weigh(tile, scoring, of, out, d_scale);
}

template <class Out>
void weigh_both_to(const Tile& tile, const Scoring& scoring, const TwoSided& of, typename Out::Element* out,
                   float* d_scale) {
  const auto weigh = tile.itself
                         ? (of.rows.positive ? &weigh_both_as<true, true, Out> : &weigh_both_as<true, false, Out>)
                         : (of.rows.positive ? &weigh_both_as<false, true, Out> : &weigh_both_as<false, false, Out>);
  weigh(tile, scoring, of, out, d_scale);
}

void weigh_both(const Tile& tile, const Scoring& scoring, const TwoSided& of, uint16_t* rounded, float* d_scale) {
  if (rounded) weigh_both_to<Rounded>(tile, scoring, of, rounded, d_scale);
  else weigh_both_to<InPlace>(tile, scoring, of, tile.scores, d_scale);
}

float largest_square(const float* rows, int64_t stride, int64_t count, int64_t width) {
  float largest = 0.0f, bad = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float* __restrict row = rows + i * stride;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += row[d] * row[d];
    largest = sum > largest ? sum : largest;
    bad += 0.0f * sum;
  }
  return largest + bad;
}
