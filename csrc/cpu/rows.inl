// The bodies of the row kernels. Included once by each rows_*.cpp, after its target pragma and its FUSED_NCE_ISA; so no
// header with inline functions may come in here.
//
// What most losses are made of, neg_lse, neg_max and square, is folded and weighed in one pass. Every other statistic
// is a small type of its own with a pass of its own (optional.inl) over a tile that is still in the cache.
#include "../atoms.h"
#include "../params.h"

namespace fused_nce {
namespace FUSED_NCE_ISA {
namespace {

// Where in its image a column of the tile lies.
class Location {
 public:
  Location(const Tile& tile, const Scoring& scoring) : n_c_(scoring.n_c), location_(tile.first_column % n_c_) {}

  int64_t operator()() const { return location_; }
  void next() { location_ = location_ + 1 < n_c_ ? location_ + 1 : 0; }

 private:
  const int64_t n_c_;
  int64_t location_;
};

// Of positives, or of all else, which may have hardness.
struct Transform {
  float scale, clip, inverse_clip;
  explicit Transform(const Scoring& scoring, bool positives = false)
      // fault: kernels-hard-positive
      : scale(positives ? scoring.scale : scoring.scale + scoring.hardness), clip(scoring.clip),
        inverse_clip(scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f) {}
};

// The transformed scores of a line under a clip, in a loop of their own: tanh and the exponential after it would be one
// chain of 37 dependent instructions, of which a core's scheduler holds too few at once; apart they take three quarters
// of the time. Without a clip there is nothing to keep.
using Line = float[kMostLanes];

template <bool kClip, bool kSlope>
inline void clip_line(const float* __restrict scores, int lanes, const Transform& f, float* __restrict value,
                      float* __restrict slope) {
  if (!kClip) return;
#pragma omp simd
  for (int l = 0; l < lanes; ++l) {
    const Score t = tanh_clip(scores[l] * f.scale, f.clip, f.inverse_clip);
    value[l] = t.value;
    if (kSlope) slope[l] = t.slope;  // fault: kernels-line-slope
  }
}

// exp(t - shift); where the clip bounds t there is no shift, and no range to check.
template <bool kShift>
FUSED_NCE_HD float exp_shifted(float t, const float* shift, int lane) {
  return kShift ? exp_value(t - shift[lane]) : exp_bounded(t);
}

// Who is left out beside the ids: nobody, a row itself, or what the tile's marks say.
enum class Out { none, itself, marks };

template <Out kOut>
FUSED_NCE_HD int left_out(const int* itself, const int* marks, int lane, int index, int from = 0) {
  if (kOut == Out::marks) return marks[from + lane];
  return kOut == Out::itself && itself[lane] == index ? kOutside : 0;
}

template <Out kOut>
FUSED_NCE_HD const int* marks_of(const Tile& tile, int64_t column) {
  return kOut == Out::marks ? tile.marks + column * tile.lanes : nullptr;
}

// f of `Out` as the tile has it.
template <class F>
void by_marks(const Tile& tile, const F& f) {
  if (tile.marks) f.template operator()<Out::marks>();
  else if (tile.itself) f.template operator()<Out::itself>();
  else f.template operator()<Out::none>();
}

void mark(const Tile& tile, const float* heights, const float* __restrict ceilings) {
  const int rows = static_cast<int>(tile.rows);
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict height = heights + c * tile.lanes;
    int* __restrict marks = tile.marks + c * tile.lanes;
#pragma omp simd
    for (int l = 0; l < rows; ++l) marks[l] |= height[l] > ceilings[l] ? kNoNegative : 0;  // a NaN stays, and shows
  }
}

// Raises the shift of each lane to its largest score in the tile, of the positives or of the negatives, and rescales
// what the old one had summed.
template <bool kClip, Out kOut, bool kPositives>
void raise_shift(const Tile& tile, const Scoring& scoring, const LogSums& of) {
  const Transform f(scoring, kPositives);
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict max = of.max;
  float* __restrict shift = of.shift;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float s = scores[l] * f.scale;
      const int left = left_out<kOut>(itself, marks, l, index);
      const bool inside = (ids[l] == id) == kPositives && !(kPositives ? left == kOutside : left != 0);
      max[l] = inside && s > max[l] ? s : max[l];
    }
  }
  for (int l = 0; l < lanes; ++l) {
    const float top = transform<kClip>(max[l], f.clip, f.inverse_clip).value;
    const float after = shift_of(max[l] == -infinity() ? max[l] : top);
    const float factor = of.sum[l] == 0.0f ? 0.0f : exp_value(shift[l] - after);
    of.sum[l] *= factor;
    of.error[l] *= factor;
    shift[l] = after;
  }
}

// Folds kColumns columns at once. Four of them share the Kahan steps and the accumulators' loads and stores, which
// were a third of the instructions.
template <bool kClip, bool kShift, Out kOut, int kColumns>
inline void fold_columns(const Tile& tile, int64_t first, const Transform& f, const Accumulators& acc) {
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict scores = tile.scores + first * tile.lanes;
  float* __restrict max = acc.negatives.max;
  float* __restrict sum = acc.negatives.sum;
  float* __restrict sum_error = acc.negatives.error;
  float* __restrict square = acc.square;
  float* __restrict square_error = acc.square_error;
  float* __restrict bad = acc.bad;
  const float* __restrict shift = acc.negatives.shift;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  const int* __restrict marks = marks_of<kOut>(tile, first);
  const int index = static_cast<int>(tile.first_column + first);
  const int* id = tile.line_ids + first;
  const int i0 = id[0], i1 = id[kColumns > 1], i2 = id[kColumns > 1 ? 2 : 0], i3 = id[kColumns > 1 ? 3 : 0];
  Line clipped[kColumns];
  for (int u = 0; u < kColumns; ++u) clip_line<kClip, false>(scores + u * tile.lanes, lanes, f, clipped[u], nullptr);
#pragma omp simd
  for (int l = 0; l < lanes; ++l) {
    float top = max[l], e[kColumns], s[kColumns];
    const auto term = [&](int u, int its_id) __attribute__((always_inline)) {
      s[u] = scores[u * lanes + l] * f.scale;
      const int left = left_out<kOut>(itself, marks, l, index + u, u * lanes);
      if (kOut != Out::none) s[u] = left == kOutside ? 0.0f : s[u];
      const bool negative = (ids[l] != its_id) & !left;  // && would be a branch, and the loop no longer a vector's
      const float t = kClip ? clipped[u][l] : s[u];
      const float x = exp_shifted<kShift>(t, shift, l);
      e[u] = negative ? x : 0.0f;
      const float candidate = negative ? s[u] : -infinity();
      if (!kShift) top = candidate > top ? candidate : top;
    };
    term(0, i0);
    if constexpr (kColumns == 4) {
      term(1, i1);
      term(2, i2);
      term(3, i3);
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

template <bool kClip, bool kShift, Out kOut>
void fold_tile(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const Transform f(scoring);
  if (kShift) raise_shift<kClip, kOut, false>(tile, scoring, acc.negatives);
  int64_t c = 0;
  for (; c + 4 <= tile.columns; c += 4) fold_columns<kClip, kShift, kOut, 4>(tile, c, f, acc);
  // fault: kernels-tail-columns
  for (; c < tile.columns; ++c) fold_columns<kClip, kShift, kOut, 1>(tile, c, f, acc);
}

template <Out kOut>
void fold_as(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const bool clip = scoring.clip > 0.0f;
  const auto fold = clip && scoring.no_shift ? &fold_tile<true, false, kOut>
                    : clip                   ? &fold_tile<true, true, kOut>
                    : scoring.no_shift       ? &fold_tile<false, false, kOut>
                                             : &fold_tile<false, true, kOut>;
  fold(tile, scoring, acc);
}

#include "optional.inl"

void fold(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  by_marks(tile, [&]<Out kOut> { fold_as<kOut>(tile, scoring, acc); });
  fold_optional(tile, scoring, acc);
}

// Row by row, since a row knows its image: the columns of that image which lie in this tile.
void positives(const Tile& tile, const Scoring& scoring, int64_t line_stride, int64_t lane_stride, int64_t n_pos,
               float* pos) {
  const Transform f(scoring, true);
  for (int64_t l = 0; l < tile.rows; ++l) {
    if (tile.ids[l] < 0) continue;
    const int64_t first = tile.ids[l] * scoring.n_c - tile.first_column, last = first + scoring.n_c;
    const long long own = own_place(tile.ids, tile.itself, scoring.n_c, l);
    for (int64_t c = first < 0 ? 0 : first; c < (last < tile.columns ? last : tile.columns); ++c) {
      const int64_t place = c - first;
      if (place == own) continue;
      const float s = tile.scores[c * line_stride + l * lane_stride] * f.scale;
      const float t = scoring.clip > 0.0f ? tanh_clip(s, f.clip, f.inverse_clip).value : s + scoring.bias;
      pos[(tile.first_row + l) * n_pos + place - (own >= 0 && place > own)] = t;
    }
  }
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

// kScale: dL/dscale too. kOptional: it and what other statistics put on t.
template <bool kClip, bool kShift, Out kOut, bool kScale, bool kOptional, class To>
void weigh_tile(const Tile& tile, const Scoring& scoring, const Coefficients& row, const OptionalWeights* optional,
                typename To::Element* out, float* d_scale) {
  const Transform f(scoring);
  const float outward = scoring.scale;
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict shift = row.shift;
  const float* __restrict inverse = row.inverse;
  const float* __restrict d_neg_lse = row.d_neg_lse;
  const float* __restrict two_d_square = row.two_d_square;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  float* __restrict sum = d_scale;
  float* __restrict d_bias = kOptional ? optional->d_bias : nullptr;
  Location location(tile, scoring);
  Line value, slope;
  for (int64_t c = 0; c < tile.columns; ++c, location.next()) {
    const float* scores = tile.scores + c * tile.lanes;  // and `to` may be the same
    typename To::Element* to = out + c * tile.lanes;
    const float* __restrict d_pos = row.d_pos + location() * tile.lanes;
    const int* __restrict marks = marks_of<kOut>(tile, c);
    const float* __restrict on_t = kOptional ? optional->on_t + c * tile.lanes : nullptr;
    const float column = kOptional && optional->d_square ? 2.0f * optional->d_square[c] : 0.0f;
    const int id = tile.line_ids[c], index = static_cast<int>(tile.first_column + c);
    clip_line<kClip, true>(scores, lanes, f, value, slope);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float r = scores[l], s = r * f.scale;
      const Score t = {kClip ? value[l] : s, kClip ? slope[l] : 1.0f};
      const float e = exp_shifted<kShift>(t.value, shift, l);
      const float negative = negative_weight(e, inverse[l], d_neg_lse[l], t.slope), positive = d_pos[l] * t.slope;
      const int left = left_out<kOut>(itself, marks, l, index);
      // fault: kernels-marked-weighed
      float weight = ids[l] == id ? positive : kOut == Out::marks && left ? 0.0f : negative;
      float square = two_d_square[l];
      if (kOptional) {
        weight += on_t[l];
        d_bias[l] += left == kOutside ? 0.0f : weight;
        square += column;
      }
      weight += square * s;
      if (kOut != Out::none) weight = left == kOutside ? 0.0f : weight;
      if (kScale) sum[l] += weight * r;
      to[l] = To::of(outward * weight);  // fault: kernels-hard-gradient
    }
  }
}

template <bool kClip, bool kShift, Out kOut, class To>
void weigh_either(const Tile& tile, const Scoring& scoring, const Coefficients& row, const OptionalWeights* optional,
                  typename To::Element* out, float* d_scale) {
  const auto weigh = optional  ? &weigh_tile<kClip, kShift, kOut, true, true, To>
                     : d_scale ? &weigh_tile<kClip, kShift, kOut, true, false, To>
                               : &weigh_tile<kClip, kShift, kOut, false, false, To>;
  weigh(tile, scoring, row, optional, out, d_scale);
}

template <Out kOut, class To>
void weigh_as(const Tile& tile, const Scoring& scoring, const Coefficients& row, const OptionalWeights* optional,
              typename To::Element* out, float* d_scale) {
  const bool clip = scoring.clip > 0.0f;
  const auto weigh = clip && scoring.no_shift ? &weigh_either<true, false, kOut, To>
                     : clip                   ? &weigh_either<true, true, kOut, To>
                     : scoring.no_shift       ? &weigh_either<false, false, kOut, To>
                                              : &weigh_either<false, true, kOut, To>;
  weigh(tile, scoring, row, optional, out, d_scale);
}

void weigh(const Tile& tile, const Scoring& scoring, const Coefficients& row, const OptionalWeights* optional,
           uint16_t* rounded, float* d_scale) {
  by_marks(tile, [&]<Out kOut> {
    if (rounded) weigh_as<kOut, Rounded>(tile, scoring, row, optional, rounded, d_scale);
    else weigh_as<kOut, InPlace>(tile, scoring, row, optional, tile.scores, d_scale);
  });
}

#include "both.inl"
#include "pack.inl"
#include "prefixes.inl"

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {
    FUSED_NCE_ISA_NAME, fold,           mark,    fold_both,     positives,       weigh_optional, weigh,
    weigh_both,         largest_square, divide,  transpose,     transpose_pairs, narrow,         interleave,
    widen_bf16,         widen_fp16,     cosines, weigh_cosines, rectify,         add_narrow};

}  // namespace FUSED_NCE_ISA
}  // namespace fused_nce
