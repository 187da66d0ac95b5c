// The generic row kernels against the formulas written plainly in double, without torch: for CPUs that run nothing else
// here (tests/backends/test_cpu_rows.py). Prints how many numbers it compared; the exit status is 1 where one differs.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "params.h"

namespace fused_nce::rows_generic {
extern const RowKernels kernels;
}

using namespace fused_nce;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const RowKernels& kernels = rows_generic::kernels;
int compared = 0, wrong = 0;

void expect(const char* what, double found, double exact, double tolerance = 4e-6) {
  ++compared;
  const double size = std::fmax(1.0, std::fabs(exact));
  if (found == exact || std::fabs(found - exact) <= tolerance * size) return;
  if (++wrong < 20) std::printf("%s: got %.9g, need %.9g\n", what, found, exact);
}

using Floats = std::vector<float>;

// One problem: `rows` of `lanes` are rows, the rest is padding; positives are the lines of an image of n_c.
struct Check {
  int lanes, rows, columns, n_c;
  float scale, clip;
  bool drop_itself, marked;
  static constexpr int kFirst = 5;  // column of the first line

  Floats scores = Floats(lanes * columns);
  std::vector<int32_t> ids = std::vector<int32_t>(lanes, -1), itself = ids, line_ids = std::vector<int32_t>(columns);
  std::vector<int32_t> marks = std::vector<int32_t>(lanes * columns), counts = std::vector<int32_t>(lanes);
  Scoring scoring{scale, clip, n_c, 1, 0};
  Tile tile{};

  double s(int c, int l) const { return static_cast<double>(scale) * scores[c * lanes + l]; }
  double t(int c, int l) const { return clip > 0 ? clip * std::tanh(s(c, l) / clip) : s(c, l); }
  double slope(int c, int l) const { return clip > 0 ? 1 - std::pow(std::tanh(s(c, l) / clip), 2) : 1; }
  bool out(int c, int l) const { return drop_itself && itself[l] == kFirst + c; }
  bool own(int c, int l) const { return ids[l] == line_ids[c]; }
  bool negative(int c, int l) const { return !own(c, l) && !out(c, l) && !marks[c * lanes + l]; }

  void draw() {
    for (int i = 0; i < lanes * columns; ++i)
      scores[i] = i % lanes < rows ? 60.0f * static_cast<float>(std::rand()) / RAND_MAX - 30.0f : 0.0f;
    for (int l = 0; l < rows; ++l) ids[l] = l, itself[l] = l * n_c;
    for (int c = 0; c < columns; ++c) line_ids[c] = (kFirst + c) / n_c;
    tile = {scores.data(),  columns, lanes, rows, kFirst, 0, ids.data(), drop_itself ? itself.data() : nullptr,
            line_ids.data()};
    if (marked) mark();
  }

  // What a driver marks: scores above 10 and, where a row is itself a column, that.
  void mark() {
    const Floats ceilings(lanes, 10.0f);
    tile.marks = marks.data();
    kernels.mark(tile, scores.data(), ceilings.data());
    for (int i = 0; i < lanes * columns; ++i)
      expect("mark", marks[i], i % lanes < rows && scores[i] > 10.0f ? kNoNegative : 0, 0);
    for (int l = 0; l < rows; ++l)
      for (int c = 0; c < columns; ++c)
        if (out(c, l)) marks[c * lanes + l] = kOutside;
  }

  void run() {
    draw();
    for (const bool no_shift : {false, true}) {
      scoring.no_shift = no_shift;
      fold();
      weigh();
    }
    if (clip == 0 && !marked) both();
    move();
  }

  // Arrays for `count` rows or columns, cleared.
  Accumulators cleared(int count, std::vector<Floats>& memory, bool optional) {
    Accumulators acc{};
    const auto take = [&](float value) { return memory.emplace_back(count, value).data(); };
    acc.negatives = {take(static_cast<float>(-kInfinity)), take(0), take(0), take(0)};
    acc.square = take(0), acc.square_error = take(0), acc.bad = take(0);
    if (!optional) return acc;
    acc.softplus = take(0), acc.softplus_error = take(0);
    acc.negative_total = take(0), acc.negative_total_error = take(0);
    counts.assign(count, 0);
    acc.negative_count = counts.data();
    return acc;
  }

  // Of one row over its columns, or of one column over the rows.
  void compare(const char* what, const Accumulators& acc, int at, bool of_rows) const {
    double sum = 0, square = 0, top = -kInfinity, softplus = 0, total = 0, count = 0;
    for (int i = 0; i < (of_rows ? columns : rows); ++i) {
      const int c = of_rows ? i : at, l = of_rows ? at : i;
      if (out(c, l)) continue;
      square += s(c, l) * s(c, l);
      if (!negative(c, l)) continue;
      total += t(c, l), ++count;
      sum += std::exp(t(c, l) - acc.negatives.shift[at]);
      top = std::fmax(top, s(c, l));
      softplus += std::log1p(std::exp(t(c, l) + scoring.bias));
    }
    expect(what, sum > 0 ? acc.negatives.sum[at] / sum : 1 + acc.negatives.sum[at], 1);
    expect(what, acc.negatives.max[at], top);
    expect(what, acc.square[at], square);
    expect(what, acc.bad[at], 0);
    if (!acc.softplus) return;
    expect(what, acc.softplus[at], softplus);
    expect(what, acc.negative_total[at], total, 2e-5);
    expect(what, acc.negative_count[at], count, 0);
  }

  void fold() {
    std::vector<Floats> memory;
    memory.reserve(32);
    const Accumulators acc = cleared(lanes, memory, true);
    kernels.fold(tile, scoring, acc);
    for (int l = 0; l < rows; ++l) compare("fold", acc, l, true);
  }

  void both() {
    scoring.no_shift = true;
    std::vector<Floats> memory;
    memory.reserve(32);
    const Accumulators acc = cleared(lanes, memory, false), lines = cleared(columns, memory, false);
    kernels.fold_both(tile, scoring, true, acc, drop_itself ? nullptr : &lines);
    for (int l = 0; l < rows; ++l) compare("fold_both, rows", acc, l, true);
    for (int c = 0; c < columns && !drop_itself; ++c) compare("fold_both, columns", lines, c, false);
  }

  void weigh() {
    const auto drawn = [&](int count, float size) {
      Floats x(count);
      for (float& y : x) y = size * static_cast<float>(std::rand()) / RAND_MAX;
      return x;
    };
    Floats shift = drawn(lanes, scoring.no_shift ? 0.0f : 3.0f), inverse = drawn(lanes, 0.1f), d = drawn(lanes, 1);
    Floats square = drawn(lanes, 0.01f), d_pos = drawn(n_c * lanes, 1), d_scale(lanes), out_tile = scores;
    std::vector<uint16_t> rounded(scores.size());
    const Coefficients of{shift.data(), inverse.data(), d.data(), square.data(), d_pos.data()};
    kernels.weigh(tile, scoring, of, nullptr, rounded.data(), nullptr);
    Tile over = tile;
    over.scores = out_tile.data();
    kernels.weigh(over, scoring, of, nullptr, nullptr, d_scale.data());
    for (int l = 0; l < rows; ++l) {
      double sum = 0;
      for (int c = 0; c < columns; ++c) {
        const double e = negative(c, l) ? std::exp(t(c, l) - shift[l]) : 0,
                     on_negative = e * inverse[l] * d[l] * slope(c, l);
        const double positive = d_pos[(kFirst + c) % n_c * lanes + l] * slope(c, l);
        const double w = out(c, l) ? 0 : (own(c, l) ? positive : on_negative) + square[l] * s(c, l);
        sum += w * scores[c * lanes + l];
        expect("weigh", out_tile[c * lanes + l], scale * w);
        Floats wide(1);
        kernels.widen_bf16(&rounded[c * lanes + l], wide.data(), 1);
        expect("weigh, rounded", wide[0], scale * w, 1.0 / 256);
      }
      expect("weigh, scale", d_scale[l], sum, 2e-5);
    }
  }

  void move() const {
    Floats turned(rows * columns);
    kernels.transpose(tile, turned.data(), columns);
    std::vector<uint16_t> narrow(scores.size());
    kernels.narrow(scores.data(), narrow.data(), static_cast<int64_t>(scores.size()));
    const int pairs = (columns + 1) / 2;
    std::vector<uint32_t> words(rows * pairs), mixed(lanes);
    kernels.transpose_pairs(tile, narrow.data(), words.data(), pairs);
    kernels.interleave(narrow.data(), columns > 1 ? narrow.data() + lanes : nullptr, mixed.data(), lanes);
    for (int l = 0; l < rows; ++l)
      for (int c = 0; c < columns; ++c) {
        expect("transpose", turned[l * columns + c], scores[c * lanes + l], 0);
        expect("transpose_pairs", (words[l * pairs + c / 2] >> (c % 2 ? 16 : 0)) & 0xffff, narrow[c * lanes + l], 0);
        if (c < 2) expect("interleave", (mixed[l] >> (c ? 16 : 0)) & 0xffff, narrow[c * lanes + l], 0);
      }
    double largest = 0;
    for (int c = 0; c < columns; ++c) {
      double sum = 0;
      for (int l = 0; l < lanes; ++l) sum += static_cast<double>(scores[c * lanes + l]) * scores[c * lanes + l];
      largest = std::fmax(largest, sum);
    }
    expect("largest_square", kernels.largest_square(scores.data(), lanes, columns, lanes) / largest, 1);
  }
};

// Every float16, by its definition.
void halves() {
  std::vector<uint16_t> all(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
  Floats found(65536);
  kernels.widen_fp16(all.data(), found.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i >> 10 & 31, fraction = i & 1023;
    const double size = exponent == 31  ? (fraction ? NAN : kInfinity)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    if (std::isnan(size)) expect("widen_fp16", std::isnan(found[i]), 1, 0);
    else expect("widen_fp16", found[i], i & 0x8000 ? -size : size, 0);
  }
}

}  // namespace

int main() {
  for (const auto& [lanes, rows, columns] : {std::array{16, 16, 8}, {16, 5, 7}, {256, 250, 13}, {48, 33, 1}})
    for (const float clip : {0.0f, 20.0f, 50.0f})
      for (const bool drop_itself : {false, true})
        for (const bool marked : {false, true})
          Check{.lanes = lanes,
                .rows = rows,
                .columns = columns,
                .n_c = 3,
                .scale = 0.4f,
                .clip = clip,
                .drop_itself = drop_itself,
                .marked = marked}
              .run();
  halves();
  std::printf("%d numbers compared, %d differ\n", compared, wrong);
  return wrong > 0;
}
