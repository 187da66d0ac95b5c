// The row kernels of prefixes: cosines from the unnormalised products of a tile, and weights back to those. Part of
// rows.inl.

void cosines(const Tile& tile, const Norms& norms, const float* products) {
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict rows = norms.rows;
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict from = products + c * tile.lanes;
    float* __restrict to = tile.scores + c * tile.lanes;
    const float line = norms.lines[c];
#pragma omp simd
    for (int l = 0; l < lanes; ++l) to[l] = from[l] * rows[l] * line;
  }
}

template <bool kClip, bool kShift, Out kOut, bool kAdd>
void weigh_cosines_of(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Norms& norms,
                      float* total, float* row_sums, float* line_sums) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict shift = row.shift;
  const float* __restrict inverse = row.inverse;
  const float* __restrict d_neg_lse = row.d_neg_lse;
  const float* __restrict two_d_square = row.two_d_square;
  const float* __restrict norm = norms.rows;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  float* __restrict sums = row_sums;
  Location location(tile, scoring);
  for (int64_t c = 0; c < tile.columns; ++c, location.next()) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    float* __restrict to = total + c * tile.lanes;
    const float* __restrict d_pos = row.d_pos + location() * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const float back = scoring.scale * norms.lines[c];
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
    float line = 0.0f;
#pragma omp simd reduction(+ : line)
    for (int l = 0; l < lanes; ++l) {
      const float r = scores[l], s = r * f.scale;
      const Score t = transform<kClip>(s, f.clip, f.inverse_clip);
      const float e = exp_shifted<kShift>(t.value, shift, l);
      const float negative = negative_weight(e, inverse[l], d_neg_lse[l], t.slope), positive = d_pos[l] * t.slope;
      const int left = left_out<kOut>(itself, marks, l, index);
      float weight = ids[l] == id ? positive : kOut == Out::marks && left ? 0.0f : negative;
      weight += two_d_square[l] * s;
      if (kOut != Out::none) weight = left == kOutside ? 0.0f : weight;
      const float along = weight * r;
      sums[l] += along;
      line += along;
      const float there = weight * norm[l] * back;
      to[l] = kAdd ? to[l] + there : there;  // fault: kernels-prefix-weights
    }
    line_sums[c] += line;
  }
}

template <bool kClip, bool kShift>
void weigh_cosines_as(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Norms& norms,
                      float* total, bool add, float* row_sums, float* line_sums) {
  by_marks(tile, [&]<Out kOut> {
    const auto weigh =
        add ? &weigh_cosines_of<kClip, kShift, kOut, true> : &weigh_cosines_of<kClip, kShift, kOut, false>;
    weigh(tile, scoring, row, norms, total, row_sums, line_sums);
  });
}

void weigh_cosines(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Norms& norms, float* total,
                   bool add, float* row_sums, float* line_sums) {
  const bool clip = scoring.clip > 0.0f;
  const auto weigh = clip && scoring.no_shift ? &weigh_cosines_as<true, false>
                     : clip                   ? &weigh_cosines_as<true, true>
                     : scoring.no_shift       ? &weigh_cosines_as<false, false>
                                              : &weigh_cosines_as<false, true>;
  weigh(tile, scoring, row, norms, total, add, row_sums, line_sums);
}
