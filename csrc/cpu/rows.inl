// The bodies of the row kernels. Included once by each rows_*.cpp, after its target pragma and its FUSED_NCE_ISA; so no
// header with inline functions may come in here.
#include "../atoms.h"
#include "../params.h"

namespace fused_nce {
namespace FUSED_NCE_ISA {
namespace {

using Range = struct {
  int64_t begin, end;
};

// The lanes whose image is `image`: their scores in a column of that image are positives, never negatives.
inline Range lanes_of(const Tile& tile, const Scoring& scoring, int64_t image) {
  const int64_t first = (image - scoring.offset) * scoring.rows_per_image - tile.first_row;
  const int64_t last = first + scoring.rows_per_image;
  Range r;
  r.begin = first < 0 ? 0 : (first > tile.rows ? tile.rows : first);
  r.end = last < 0 ? 0 : (last > tile.rows ? tile.rows : last);
  return r;
}

// Walks the columns of a tile: which lanes are their positives, and where the column lies in its image.
class Columns {
 public:
  Columns(const Tile& tile, const Scoring& scoring)
      : tile_(tile), scoring_(scoring), image_(tile.first_column / scoring.n_c),
        location_(tile.first_column - image_ * scoring.n_c), own_(lanes_of(tile, scoring, image_)) {}

  Range own() const { return own_; }
  int64_t location() const { return location_; }

  void next() {
    if (++location_ < scoring_.n_c) return;
    location_ = 0;
    own_ = lanes_of(tile_, scoring_, ++image_);
  }

 private:
  const Tile& tile_;
  const Scoring& scoring_;
  int64_t image_, location_;
  Range own_;
};

// A range of lanes as one unsigned comparison.
struct Siblings {
  unsigned begin, count;
  bool hold(int lane) const { return static_cast<unsigned>(lane) - begin < count; }
};

inline Siblings siblings(Range own) {
  return {static_cast<unsigned>(own.begin), static_cast<unsigned>(own.end - own.begin)};
}

struct Transform {
  float scale, clip, inverse_clip;
  explicit Transform(const Scoring& scoring)
      : scale(scoring.scale), clip(scoring.clip), inverse_clip(scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f) {}
};

// exp(t - shift); where the clip bounds t there is no shift, and no range to check.
template <bool kShift>
FUSED_NCE_HD float exp_shifted(float t, const float* shift, int lane) {
  return kShift ? exp_value(t - shift[lane]) : exp_bounded(t);
}

// Raises the shift of each lane to its largest negative score in the tile, and rescales what the old one had summed.
template <bool kClip>
void raise_shift(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict max = acc.max;
  float* __restrict shift = acc.shift;
  Columns column(tile, scoring);
  for (int64_t c = 0; c < tile.columns; ++c, column.next()) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    const Siblings own = siblings(column.own());
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float s = scores[l] * f.scale;
      max[l] = !own.hold(l) && s > max[l] ? s : max[l];
    }
  }
  for (int l = 0; l < lanes; ++l) {
    const float top = transform<kClip>(max[l], f.clip, f.inverse_clip).value;
    const float after = shift_of(max[l] == -infinity() ? max[l] : top);
    const float factor = acc.sum[l] == 0.0f ? 0.0f : exp_value(shift[l] - after);
    acc.sum[l] *= factor;
    acc.sum_error[l] *= factor;
    shift[l] = after;
  }
}

// Folds kColumns columns at once. Four of them share the Kahan steps and the accumulators' loads and stores, which
// were a third of the instructions.
template <bool kClip, bool kShift, int kColumns>
inline void fold_columns(const float* __restrict scores, const Tile& tile, const Transform& f, const Siblings* own,
                         const Accumulators& acc) {
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict max = acc.max;
  float* __restrict sum = acc.sum;
  float* __restrict sum_error = acc.sum_error;
  float* __restrict square = acc.square;
  float* __restrict square_error = acc.square_error;
  float* __restrict bad = acc.bad;
  const float* __restrict shift = acc.shift;
  const Siblings o0 = own[0], o1 = own[kColumns > 1], o2 = own[kColumns > 1 ? 2 : 0], o3 = own[kColumns > 1 ? 3 : 0];
#pragma omp simd
  for (int l = 0; l < lanes; ++l) {
    float top = max[l], e[kColumns], s[kColumns];
    const auto term = [&](int u, Siblings o) __attribute__((always_inline)) {
      s[u] = scores[u * lanes + l] * f.scale;
      const bool negative = !o.hold(l);
      const float t = transform<kClip>(s[u], f.clip, f.inverse_clip).value;
      const float x = exp_shifted<kShift>(t, shift, l);
      e[u] = negative ? x : 0.0f;
      if (!kShift) top = negative && s[u] > top ? s[u] : top;
    };
    term(0, o0);
    if constexpr (kColumns == 4) {
      term(1, o1);
      term(2, o2);
      term(3, o3);
      add_exactly(sum[l], sum_error[l], (e[0] + e[1]) + (e[2] + e[3]));
      add_exactly(square[l], square_error[l], (s[0] * s[0] + s[1] * s[1]) + (s[2] * s[2] + s[3] * s[3]));
      bad[l] += (s[0] * 0.0f + s[1] * 0.0f) + (s[2] * 0.0f + s[3] * 0.0f);
    } else {
      add_exactly(sum[l], sum_error[l], e[0]);
      add_exactly(square[l], square_error[l], s[0] * s[0]);
      bad[l] += s[0] * 0.0f;
    }
    max[l] = top;
  }
}

template <bool kClip, bool kShift>
void fold_tile(const Tile& tile, const Scoring& scoring, const Accumulators& acc, float* pos) {
  const Transform f(scoring);
  if (kShift) raise_shift<kClip>(tile, scoring, acc);
  Columns column(tile, scoring);
  Siblings own[4];
  for (int64_t c = 0; c < tile.columns;) {
    const float* scores = tile.scores + c * tile.lanes;
    const int64_t step = tile.columns - c >= 4 ? 4 : 1;
    for (int64_t u = 0; u < step; ++u, column.next()) {
      const Range range = column.own();
      own[u] = siblings(range);
      for (int64_t l = range.begin; l < range.end; ++l)
        pos[(tile.first_row + l) * scoring.n_c + column.location()] =
            transform<kClip>(scores[u * tile.lanes + l] * f.scale, f.clip, f.inverse_clip).value;
    }
    if (step == 4) fold_columns<kClip, kShift, 4>(scores, tile, f, own, acc);
    else fold_columns<kClip, kShift, 1>(scores, tile, f, own, acc);
    c += step;
  }
}

void fold(const Tile& tile, const Scoring& scoring, const Accumulators& acc, float* pos) {
  if (needs_no_shift(scoring.clip)) return fold_tile<true, false>(tile, scoring, acc, pos);
  if (scoring.clip > 0.0f) return fold_tile<true, true>(tile, scoring, acc, pos);
  fold_tile<false, true>(tile, scoring, acc, pos);
}

// dL/d pos of one positive.
inline float positive_slope(const Positives& positives, int64_t row, int64_t at) {
  if (positives.d_pos) return positives.d_pos[at];
  return positives.nce_weight * nce_slope_positive(positives.neg_lse[row], positives.pos[at]);
}

// Round to nearest even; a NaN whose payload would round away stays a NaN.
FUSED_NCE_HD uint16_t to_bf16(float x) {
  const unsigned bits = static_cast<unsigned>(bits_of(x));
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Weights as the GEMMs want them: float, over the scores, or bfloat16 in an array of their own.
struct InPlace {
  using Element = float;
  static Element of(float weight) { return weight; }
};
struct Rounded {
  using Element = uint16_t;
  static Element of(float weight) { return to_bf16(weight); }
};

template <bool kClip, bool kShift, bool kScale, class Out>
void weigh_tile(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Positives& positives,
                typename Out::Element* out, float* d_scale, float* spare) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict shift = row.shift;
  const float* __restrict inverse = row.inverse;
  const float* __restrict d_neg_lse = row.d_neg_lse;
  const float* __restrict two_d_square = row.two_d_square;
  float* __restrict sum = d_scale;
  float own_sum = 0.0f;
  Columns column(tile, scoring);
  for (int64_t c = 0; c < tile.columns; ++c, column.next()) {
    const float* scores = tile.scores + c * tile.lanes;
    typename Out::Element* to = out + c * tile.lanes;
    // The loop over the lanes treats the positives as negatives and overwrites their scores, so those are kept aside
    // and their weights are put in afterwards. No vector may read what a scalar has just stored: the stall cost a
    // quarter of the kernel.
    const Range range = column.own();
    const Siblings own = siblings(range);
    for (int64_t l = range.begin; l < range.end; ++l) spare[l] = scores[l];
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float s = scores[l] * f.scale;
      const Score t = transform<kClip>(s, f.clip, f.inverse_clip);
      const float e = exp_shifted<kShift>(t.value, shift, l);
      const float weight = negative_weight(e, inverse[l], d_neg_lse[l], t.slope) + two_d_square[l] * s;
      if (kScale) sum[l] += own.hold(l) ? 0.0f : weight * scores[l];
      to[l] = Out::of(f.scale * weight);
    }
    for (int64_t l = range.begin; l < range.end; ++l) {
      const int64_t i = tile.first_row + l;
      const float s = spare[l] * f.scale;
      const float slope = transform<kClip>(s, f.clip, f.inverse_clip).slope;
      const float d_pos = positive_slope(positives, i, i * scoring.n_c + column.location());
      const float weight = d_pos * slope + two_d_square[l] * s;
      own_sum += weight * spare[l];
      to[l] = Out::of(f.scale * weight);
    }
  }
  if (kScale) sum[0] += own_sum;
}

template <bool kClip, bool kShift, class Out>
void weigh_either(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Positives& positives,
                  typename Out::Element* out, float* d_scale, float* spare) {
  if (d_scale) weigh_tile<kClip, kShift, true, Out>(tile, scoring, row, positives, out, d_scale, spare);
  else weigh_tile<kClip, kShift, false, Out>(tile, scoring, row, positives, out, d_scale, spare);
}

template <class Out>
void weigh_as(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Positives& positives,
              typename Out::Element* out, float* d_scale, float* spare) {
  if (needs_no_shift(scoring.clip))
    return weigh_either<true, false, Out>(tile, scoring, row, positives, out, d_scale, spare);
  if (scoring.clip > 0.0f) return weigh_either<true, true, Out>(tile, scoring, row, positives, out, d_scale, spare);
  weigh_either<false, true, Out>(tile, scoring, row, positives, out, d_scale, spare);
}

void weigh(const Tile& tile, const Scoring& scoring, const Coefficients& row, const Positives& positives,
           uint16_t* rounded, float* d_scale, float* spare) {
  if (rounded) weigh_as<Rounded>(tile, scoring, row, positives, rounded, d_scale, spare);
  else weigh_as<InPlace>(tile, scoring, row, positives, tile.scores, d_scale, spare);
}

// kVector 32-bit words: one register where the instruction set has one as wide.
constexpr int kVector = FUSED_NCE_VECTOR;
typedef int Words __attribute__((vector_size(kVector * 4)));
typedef uint16_t Halves __attribute__((vector_size(kVector * 2)));

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct Count : Count<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct Count<0, kIndex...> {
  using type = Indices<kIndex...>;
};

// One step of the transposition: the elements of `a` whose index has the bit kStep change places with those of `b`
// whose index has not.
template <int kStep, int... kIndex>
inline __attribute__((always_inline)) void exchange(Words& a, Words& b, Indices<kIndex...>) {
  const Words low = __builtin_shufflevector(a, b, ((kIndex & kStep) ? kVector + kIndex - kStep : kIndex)...);
  b = __builtin_shufflevector(a, b, ((kIndex & kStep) ? kVector + kIndex : kIndex + kStep)...);
  a = low;
}

template <int kStep>
inline __attribute__((always_inline)) void exchange_all(Words* row) {
  if constexpr (kStep < kVector) {
    for (int i = 0; i < kVector; ++i)
      if (!(i & kStep)) exchange<kStep>(row[i], row[i + kStep], typename Count<kVector>::type());
    exchange_all<2 * kStep>(row);
  }
}

// `words(r, l)` is what rows r of the input hold at lanes l .. l + kVector - 1; rows from `rows` on do not exist.
template <class Load>
inline __attribute__((always_inline)) void transpose_words(int64_t rows, int64_t lanes, int* out, int64_t out_stride,
                                                           const Load& words) {
  for (int64_t r0 = 0; r0 < rows; r0 += kVector) {
    const int64_t here = rows - r0 < kVector ? rows - r0 : kVector;
    for (int64_t l0 = 0; l0 < lanes; l0 += kVector) {
      Words block[kVector];
      for (int64_t r = 0; r < kVector; ++r) block[r] = r < here ? words(r0 + r, l0) : Words{};
      exchange_all<1>(block);
      const int64_t used = lanes - l0 < kVector ? lanes - l0 : kVector;
      for (int64_t l = 0; l < used; ++l)
        __builtin_memcpy(out + (l0 + l) * out_stride + r0, &block[l], static_cast<unsigned long>(here) * 4);
    }
  }
}

void transpose(const Tile& tile, float* out, int64_t out_stride) {
  transpose_words(tile.columns, tile.rows, reinterpret_cast<int*>(out), out_stride, [&](int64_t c, int64_t l) {
    Words w;
    __builtin_memcpy(&w, tile.scores + c * tile.lanes + l, sizeof(w));
    return w;
  });
}

void transpose_pairs(const Tile& tile, const uint16_t* rounded, uint32_t* out, int64_t out_stride) {
  transpose_words((tile.columns + 1) / 2, tile.rows, reinterpret_cast<int*>(out), out_stride,
                  [&](int64_t pair, int64_t l) {
                    Halves even, odd{};
                    const uint16_t* from = rounded + 2 * pair * tile.lanes + l;
                    __builtin_memcpy(&even, from, sizeof(even));
                    if (2 * pair + 1 < tile.columns) __builtin_memcpy(&odd, from + tile.lanes, sizeof(odd));
                    return __builtin_convertvector(even, Words) | __builtin_convertvector(odd, Words) << 16;
                  });
}

void narrow(const float* __restrict in, uint16_t* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(in[i]);
}

void widen_bf16(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = float_of(static_cast<int>(static_cast<unsigned>(in[i]) << 16));
}

// The exponent is rebased by a multiplication, which also normalises subnormals; infinities and NaN keep their payload.
void widen_fp16(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
  const float rebase = float_of(0x77800000);  // 2^112
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const int half = in[i], magnitude = (half & 0x7fff) << 13;
    const int finite = bits_of(float_of(magnitude) * rebase);
    const int special = magnitude | 0x7f800000;
    out[i] = float_of(((half & 0x7c00) == 0x7c00 ? special : finite) | (half & 0x8000) << 16);
  }
}

void interleave(const uint16_t* __restrict even, const uint16_t* __restrict odd, uint32_t* __restrict out,
                int64_t count) {
  if (!odd) {
    for (int64_t i = 0; i < count; ++i) out[i] = even[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
}

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {FUSED_NCE_ISA_NAME, fold,       weigh,      transpose, transpose_pairs, narrow,
                            interleave,         widen_bf16, widen_fp16};

}  // namespace FUSED_NCE_ISA
}  // namespace fused_nce
