// One pass a statistic, over a tile of scores: what the fused kernels leave out. Part of rows.inl.

// The positives as a set, of which a row may have any number.
template <bool kClip, Out kOut>
void fold_positives(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  raise_shift<kClip, kOut, true>(tile, scoring, acc.positives);
  const Transform f(scoring, true);
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict sum = acc.positives.sum;
  float* __restrict sum_error = acc.positives.error;
  float* __restrict total = acc.total;
  float* __restrict total_error = acc.total_error;
  int* __restrict count = acc.count;
  const float* __restrict shift = acc.positives.shift;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const bool inside = (ids[l] == id) & (left_out<kOut>(itself, marks, l, index) != kOutside);
      const float t = transform<kClip>(scores[l] * f.scale, f.clip, f.inverse_clip).value;
      const float e = exp_value(t - shift[l]);
      add_exactly(sum[l], sum_error[l], inside ? e : 0.0f);
      add_exactly(total[l], total_error[l], inside ? t : 0.0f);
      count[l] += inside;
    }
  }
}

template <bool kClip, Out kOut>
void fold_softplus(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const Transform f(scoring);
  const float bias = scoring.bias;
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict sum = acc.softplus;
  float* __restrict error = acc.softplus_error;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const bool inside = (ids[l] != id) & !left_out<kOut>(itself, marks, l, index);
      const float t = transform<kClip>(scores[l] * f.scale, f.clip, f.inverse_clip).value + bias;
      const float x = softplus(t);
      add_exactly(sum[l], error[l], inside ? x : 0.0f);
    }
  }
}

template <bool kClip, Out kOut>
void fold_negatives(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict total = acc.negative_total;
  float* __restrict error = acc.negative_total_error;
  int* __restrict count = acc.negative_count;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const bool inside = (ids[l] != id) & !left_out<kOut>(itself, marks, l, index);
      const float t = transform<kClip>(scores[l] * f.scale, f.clip, f.inverse_clip).value;
      add_exactly(total[l], error[l], inside ? t : 0.0f);
      count[l] += inside;
    }
  }
}

void fold_optional(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const auto fold = [&]<bool kClip, Out kOut> {
    if (acc.count) fold_positives<kClip, kOut>(tile, scoring, acc);
    if (acc.softplus) fold_softplus<kClip, kOut>(tile, scoring, acc);
    if (acc.negative_count) fold_negatives<kClip, kOut>(tile, scoring, acc);
  };
  by_marks(tile, [&]<Out kOut> {
    if (scoring.clip > 0.0f) fold.template operator()<true, kOut>();
    else fold.template operator()<false, kOut>();
  });
}

// What one statistic puts on t: of the rows, its numbers change from lane to lane, of the columns from line to line. A
// row itself is still among them; `weigh` takes it out.
template <class Stat, bool kOfRows, bool kClip, Out kOut>
void weigh_one(const Tile& tile, const Scoring& scoring, const Upstreams& of, float* out) {
  if (!of.d[Stat::kName]) return;
  const Transform f(scoring, Stat::kPositives);
  const float bias = scoring.bias;
  const int rows = static_cast<int>(tile.rows);  // padding has no part in any column
  const int* __restrict ids = tile.ids;
  const float* __restrict d = of.d[Stat::kName];
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    float* __restrict on_t = out + c * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const int id = tile.line_ids[c];
#pragma omp simd
    for (int l = 0; l < rows; ++l) {
      const Score t = transform<kClip>(scores[l] * f.scale, f.clip, f.inverse_clip);
      const auto found = [&](int name) __attribute__((always_inline)) { return of.found[name][kOfRows ? l : c]; };
      const float w = Stat::weight(t.value + bias, found) * d[kOfRows ? l : c] * t.slope;
      const bool left = !Stat::kPositives && kOut == Out::marks && marks[l];
      on_t[l] += (ids[l] == id) == Stat::kPositives && !left ? w : 0.0f;
    }
  }
}

template <bool kOfRows, bool kClip, Out kOut, class... Stats>
void weigh_each(const Tile& tile, const Scoring& scoring, const Upstreams& of, float* on_t) {
  (weigh_one<Stats, kOfRows, kClip, kOut>(tile, scoring, of, on_t), ...);
}

template <bool kClip>
void weigh_optional_as(const Tile& tile, const Scoring& scoring, const Upstreams& rows, const Upstreams& columns,
                       float* on_t) {
  __builtin_memset(on_t, 0, static_cast<unsigned long>(tile.columns * tile.lanes) * sizeof(float));
  const auto weigh = tile.marks ? &weigh_each<true, kClip, Out::marks, NegSoftplus, NegSum, PosLse, PosSum, PosGap>
                                : &weigh_each<true, kClip, Out::none, NegSoftplus, NegSum, PosLse, PosSum, PosGap>;
  weigh(tile, scoring, rows, on_t);
  weigh_each<false, kClip, Out::none, NegLse, NegSoftplus, NegSum, PosLse, PosSum, PosGap>(tile, scoring, columns,
                                                                                           on_t);
}

void weigh_optional(const Tile& tile, const Scoring& scoring, const Upstreams& rows, const Upstreams& columns,
                    float* on_t) {
  if (scoring.clip > 0.0f) weigh_optional_as<true>(tile, scoring, rows, columns, on_t);
  else weigh_optional_as<false>(tile, scoring, rows, columns, on_t);
}
