// A GPU that computes nothing: it counts what the driver launches, for shapes that no emulation could run. The kernels
// have the names of `bench.static_cuda`.
#include <algorithm>

#include "groups.h"
#include "machines.h"

namespace fused_nce {
namespace cuda {

namespace {

Counts counts;

std::string named(const char* kernel, float clip) {
  std::string name = kernel;
  with_transform(clip, [&](auto has_clip, auto shift) {
    if (has_clip.value) name += " clip";
    if (shift.value) name += " shift";
  });
  return name;
}

const char* named(Extras extras) {
  constexpr const char* kNames[] = {"", " columns", " extras", " marks"};
  return kNames[static_cast<int>(extras)];
}

std::string with(const std::string& name, Element element) {
  constexpr const char* kNames[] = {" float32", " bfloat16", " float16"};
  return name + kNames[static_cast<int>(element)];
}

int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

// `strip` bytes are those of scores, which cross the L2 where a strip of them fits there.
void add(const std::string& kernel, int64_t scores, int64_t flop, int64_t bytes, int64_t strip) {
  Count& count = counts[kernel];
  ++count.launches;
  count.scores += scores;
  count.flop += flop;
  count.bytes += bytes;
  count.strip_bytes += strip;
}

class Tally final : public Machine {
 public:
  void gemm(const Gemm& g) const override {
    const int64_t operands = (g.m * g.depth + g.depth * g.n) * bytes_of(g.element);
    const int64_t out = g.m * g.n * bytes_of(g.out_element) * (g.add ? 2 : 1);
    const bool scores = g.right_transposed;
    Count& count = counts[with("gemm", g.element)];
    count.strip = std::max(count.strip, scores ? out : 0);
    add(with("gemm", g.element), 0, 2 * g.m * g.n * g.depth, operands + (scores ? 0 : out), scores ? out : 0);
  }

  void mark(const Strip& strip, const Rules&, const Marking&) const override { pass("mark", strip, 4, 0); }

  void fold(const Strip& strip, const Rules& rules, const RowArrays&, int64_t) const override {
    with_fold_extras(strip, rules,
                     [&](auto extras) { pass(named("fold", rules.scoring.clip) + named(extras.value), strip, 4, 0); });
  }

  void fold_optional(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t) const override {
    with_optional_extras(strip, [&](auto extras) {
      std::string name = rules.scoring.clip > 0.0f ? "fold_optional clip" : "fold_optional";
      if (rows.optional.totals) name += " totals";
      pass(name + named(extras.value), strip, 4, 0);
    });
  }

  void cosines(const Strip& strip, const Rules&, const PrefixStrip&) const override { pass("cosines", strip, 8, 0); }

  void weigh_prefix(const Strip& strip, const Rules& rules, const RowArrays&, const PrefixStrip&,
                    Element element) const override {
    pass(with(named("weigh_prefix", rules.scoring.clip), element), strip, 16, bytes_of(element));
  }

  void fold_columns(const Strip& strip, const Rules& rules, const ColumnArrays&) const override {
    pass(named("fold_columns", rules.scoring.clip), strip, 4, 0);
  }

  void weigh(const Strip& strip, const Rules& rules, const RowArrays& rows, Element element) const override {
    pass(with(named("weigh", rules.scoring.clip) + named(extras_of(strip, rules, rows)), element), strip, 4,
         bytes_of(element));
  }

  void loss(const RowTask* tasks, int count, Element element) const override {
    const std::string name = with(named("loss", tasks->rules.scoring.clip), element) + (count > 1 ? " together" : "");
    const int64_t looks = kept_bytes(tasks, count, kSharedBytes) > 0 ? 1 : 2;  // at a score in the strip
    for (int t = 0; t < count; ++t) pass(name, tasks[t].strip, 4 * looks, bytes_of(element));
    counts[name].launches -= count - 1;
  }

  void loss_and_summary(const RowTask& task, const Summaries& all, Element element) const override {
    const std::string name = with(named("loss_summary", task.rules.scoring.clip), element);
    const int64_t looks = kept_bytes(&task, 1, kSharedBytes) > 0 ? 1 : 2;
    pass(name, task.strip, 4 * looks, bytes_of(element));
    counts[name].bytes += statistics_bytes(all);
  }

  void finish(int64_t, int64_t count, const Rules& rules, const RowArrays& rows, bool) const override {
    const auto part = static_cast<int64_t>(sizeof(RowPart));
    add(needs_no_shift(rules.scoring.clip) ? "finish" : "finish shift", 0, 0, count * rows.scratch.slots * part, 0);
  }

  void finish_optional(int64_t, int64_t count, const Rules&, const RowArrays& rows, bool) const override {
    add("finish_optional", 0, 0, count * rows.scratch.slots * static_cast<int64_t>(sizeof(OptionalPart)), 0);
  }

  void finish_columns(int64_t count, const Rules& rules, const ColumnArrays&) const override {
    const auto part = static_cast<int64_t>(sizeof(ColumnPart));
    add(needs_no_shift(rules.scoring.clip) ? "finish_columns" : "finish_columns shift", 0, 0, count * part, 0);
  }

  void summarize(const Summaries& all) const override {
    add("summary", 0, 0, statistics_bytes(all), 0);
    if (all.ctas > 1) add("last_summary", 0, 0, all.ctas * static_cast<int64_t>(sizeof(Totals)), 0);
  }

  // An upstream gradient of 1, which `loss.backward()` has: nothing is touched.
  void multiply(const Products&, Element element, const float*) const override {
    add(with("multiply", element), 0, 0, 4, 0);
  }

  void unit_rows(const Units& all, Element element) const override {
    const int64_t rows = all.q.rows + all.k.rows, written = all.positives ? all.q.rows : rows;
    add(with("unit", element), 0, 0, (rows + written) * all.width * bytes_of(element), 0);
  }

  void through_rows(const Throughs& all, Element element) const override {
    int64_t bytes = all.own.x ? all.q.rows * bytes_of(element) : 0;
    for (const ThroughSide* side : {&all.q, &all.k})
      bytes += side->rows * (2 * bytes_of(element) + (side->wide ? 4 : bytes_of(element)));
    add(with("through", element), 0, 0, bytes * all.width, 0);
  }

 private:
  static int64_t statistics_bytes(const Summaries& all) {
    int64_t bytes = 0;
    for (int i = 0; i < all.count; ++i) bytes += 4 * all.of[i].rows * (all.of[i].positives + 3);
    return bytes;
  }

  // Of a strip's scores: so many bytes each, and so many of what is made of them.
  static void pass(const std::string& name, const Strip& strip, int64_t read, int64_t written) {
    const int64_t scores = strip.rows * strip.columns;
    add(name, scores, 0, written * scores, read * scores);
  }
};

std::unique_ptr<Machine> tallying() { return std::make_unique<Tally>(); }

}  // namespace

Counts tally(bool begin) {
  emulate_by(begin ? &tallying : nullptr);
  Counts found;
  found.swap(counts);
  return found;
}

}  // namespace cuda
}  // namespace fused_nce
