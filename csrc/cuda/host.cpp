#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <atomic>
#include <limits>
#include <utility>
#include <vector>

#include "groups.h"
#include "machines.h"

namespace fused_nce {
namespace cuda {

namespace {

// A CTA's threads, run one after the other, and merged in the tree of `Cta` (cta.h).
struct CtaEmulator {
  int threads;

  bool first() const { return true; }
  void barrier() const {}

  template <class F>
  void each(const F& f) const {
    for (int t = 0; t < threads; ++t) f(t, threads);
  }

  template <class F, class Merge>
  auto reduce(const F& f, const Merge& merge) const {
    std::vector<decltype(f(0, 1))> found, warps;
    for (int t = 0; t < threads; ++t) found.push_back(f(t, threads));
    for (int w = 0; w < threads; w += 32) {
      for (int offset = 16; offset > 0; offset /= 2)
        for (int lane = 0; lane < offset; ++lane) found[w + lane] = merge(found[w + lane], found[w + lane + offset]);
      warps.push_back(found[w]);
    }
    for (size_t offset = 16; offset > 0; offset /= 2)
      for (size_t w = 0; w < offset && w + offset < warps.size(); ++w) warps[w] = merge(warps[w], warps[w + offset]);
    return warps[0];
  }

  template <class F, class Merge, class Use>
  void reduce_warps(const F& f, const Merge& merge, const Use& use) const {
    for (int lane = 0; lane < kColumnLanes; ++lane) {
      std::vector<decltype(f(0, 0, 1))> warps;
      warps.reserve(kColumnWarps);
      for (int w = 0; w < kColumnWarps; ++w) warps.push_back(f(lane, w, kColumnWarps));
      for (int offset = kColumnWarps / 2; offset > 0; offset /= 2)
        for (int w = 0; w < offset; ++w) warps[w] = merge(warps[w], warps[w + offset]);
      use(lane, warps[0]);
    }
  }
};

template <class E>
class StoreAs {
 public:
  static constexpr bool kRounds = sizeof(E) == 2;
  StoreAs(const Strip& strip, int64_t row) : row_(static_cast<E*>(strip.weights) + row * strip.stride) {}

  void operator()(int column, const float (&w)[kColumns]) const {
    for (int u = 0; u < kColumns; ++u) row_[column + u] = static_cast<E>(w[u]);
  }

 private:
  E* row_;
};

template <class F>
void with_store(Element element, const F& f) {
  if (element == Element::float32) return f(static_cast<StoreAs<float>*>(nullptr));
  if (element == Element::bfloat16) return f(static_cast<StoreAs<c10::BFloat16>*>(nullptr));
  f(static_cast<StoreAs<c10::Half>*>(nullptr));
}

template <class E>
struct Numbers {
  static float read(const void* x, int64_t i) { return static_cast<const E*>(x)[i]; }
  static void write(void* x, int64_t i, float value) { static_cast<E*>(x)[i] = static_cast<E>(value); }
  static float rounded(float value) { return static_cast<E>(value); }
};

template <class F>
void with_numbers(Element element, const F& f) {
  if (element == Element::float32) return f(Numbers<float>());
  if (element == Element::bfloat16) return f(Numbers<c10::BFloat16>());
  f(Numbers<c10::Half>());
}

at::ScalarType type_of(Element element) {
  if (element == Element::float32) return at::kFloat;
  return element == Element::bfloat16 ? at::kBFloat16 : at::kHalf;
}

// A stored operand as the (rows, columns) matrix that the product wants, in float.
at::Tensor operand(const void* data, int64_t stride, bool transposed, int64_t rows, int64_t columns, Element element) {
  if (transposed) std::swap(rows, columns);
  const at::Tensor stored =
      at::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1}, at::TensorOptions(type_of(element)));
  return (transposed ? stored.t() : stored).to(at::kFloat);
}

std::atomic<int64_t> launches{0};
MakeMachine another = nullptr;

class Emulator final : public Machine {
  template <class F>
  static void for_each_thread(const Strip& strip, const Rules& rules, const F& f) {
    ++launches;
    for (int64_t r = 0; r < strip.rows; ++r)
      for (int part = 0; part < rules.ctas_per_row; ++part)
        for (int thread = 0; thread < rules.threads; ++thread) f(r, part, thread, rules.threads);
  }

 public:
  void gemm(const Gemm& g) const override {
    ++launches;
    const at::Tensor left = operand(g.left, g.left_stride, g.left_transposed, g.m, g.depth, g.element);
    const at::Tensor right = operand(g.right, g.right_stride, g.right_transposed, g.depth, g.n, g.element);
    const at::Tensor out =
        at::from_blob(g.out, {g.m, g.n}, {g.out_stride, 1}, at::TensorOptions(type_of(g.out_element)));
    const at::Tensor product = at::mm(left, right).mul_(g.alpha);
    out.copy_(g.add ? product.add_(out) : product);
  }

  void mark(const Strip& strip, const Rules& rules, const Marking& by) const override {
    for_each_thread(strip, rules, [&](auto... place) { mark_thread(strip, rules, by, place...); });
  }

  void cosines(const Strip& strip, const Rules& rules, const PrefixStrip& by) const override {
    for_each_thread(strip, rules, [&](auto... place) { cosines_thread(strip, rules, by, place...); });
  }

  void weigh_prefix(const Strip& strip, const Rules& rules, const RowArrays& rows, const PrefixStrip& by,
                    Element element) const override {
    ++launches;
    CtaEmulator group{rules.threads};
    with_store(element, [&](auto* store) {
      with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
        with_fold_extras(strip, rules, [&](auto extras) {
          using Whole = std::decay_t<decltype(*store)>;
          using Store = StorePrefix<Whole, !std::is_same_v<Whole, StoreAs<float>>>;
          for (int64_t r = 0; r < strip.rows; ++r)
            for (int part = 0; part < rules.ctas_per_row; ++part)
              weigh_row<clip.value, shift.value, extras.value, Store>(group, strip, rules, rows, r, part, InStrip(),
                                                                      rules, by);
        });
      });
    });
  }

  void fold(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t first_slot) const override {
    ++launches;
    CtaEmulator group{rules.threads};
    with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
      with_fold_extras(strip, rules, [&](auto extras) {
        for (int64_t r = 0; r < strip.rows; ++r)
          for (int part = 0; part < rules.ctas_per_row; ++part)
            fold_row<clip.value, shift.value, extras.value>(group, strip, rules, rows, r, part, first_slot + part);
      });
    });
  }

  void fold_optional(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t first_slot) const override {
    ++launches;
    CtaEmulator group{rules.threads};
    with_flag(rules.scoring.clip > 0.0f, [&](auto clip) {
      with_optional_extras(strip, [&](auto extras) {
        with_flag(rows.optional.totals, [&](auto totals) {
          for (int64_t r = 0; r < strip.rows; ++r)
            for (int part = 0; part < rules.ctas_per_row; ++part)
              fold_optional_row<clip.value, totals.value, extras.value>(group, strip, rules, rows, r, part,
                                                                        first_slot + part);
        });
      });
    });
  }

  void finish_optional(int64_t first_row, int64_t count, const Rules& rules, const RowArrays& rows,
                       bool tail) const override {
    ++launches;
    CtaEmulator group{32};
    for (int64_t i = first_row; i < first_row + count; ++i) finish_optional_row(group, rules, rows, i, tail);
  }

  void finish(int64_t first_row, int64_t count, const Rules& rules, const RowArrays& rows, bool tail) const override {
    ++launches;
    CtaEmulator group{32};
    for (int64_t i = first_row; i < first_row + count; ++i)
      needs_no_shift(rules.scoring.clip) ? finish_row<false>(group, rules, rows, i, tail)
                                         : finish_row<true>(group, rules, rows, i, tail);
  }

  void weigh(const Strip& strip, const Rules& rules, const RowArrays& rows, Element element) const override {
    ++launches;
    CtaEmulator group{rules.threads};
    with_store(element, [&](auto* store) {
      with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
        with_extras(extras_of(strip, rules, rows), [&](auto extras) {
          using Store = std::decay_t<decltype(*store)>;
          for (int64_t r = 0; r < strip.rows; ++r)
            for (int part = 0; part < rules.ctas_per_row; ++part)
              weigh_row<clip.value, shift.value, extras.value, Store>(group, strip, rules, rows, r, part, InStrip());
        });
      });
    });
  }

  void loss(const RowTask* tasks, int count, Element element) const override {
    ++launches;
    CtaEmulator group{tasks->rules.threads};
    with_store(element, [&](auto* store) {
      with_transform(tasks->rules.scoring.clip, [&](auto clip, auto shift) {
        using Store = std::decay_t<decltype(*store)>;
        const int64_t kept = kept_bytes(tasks, count, kSharedBytes);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        int64_t rows = 0;
        for (int t = 0; t < count; ++t) rows += tasks[t].strip.rows;
        for (int64_t i = 0; i < rows; ++i) {
          int64_t r = i;
          const RowTask& task = task_of(tasks, r);
          std::vector<Four> memory(kept / sizeof(Four), Four{nan, nan, nan, nan});
          loss_row<clip.value, shift.value, Store>(group, task.strip, task.rules, task.rows, r, memory.data(),
                                                   kept > 0);
        }
      });
    });
  }

  void loss_and_summary(const RowTask& task, const Summaries& all, Element element) const override {
    loss(&task, 1, element);
    CtaEmulator group{task.rules.threads};
    for (int64_t i = 0; i < task.strip.rows; ++i) sum_up_row(group, all, i);
    sum_up_rows(group, all);
  }

  void fold_columns(const Strip& strip, const Rules& rules, const ColumnArrays& columns) const override {
    ++launches;
    CtaEmulator group{kColumnLanes * kColumnWarps};
    with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
      for (int64_t block = 0; block * kColumnLanes < strip.columns; ++block)
        cuda::fold_columns<clip.value, shift.value>(group, strip, rules, columns, block);
    });
  }

  void finish_columns(int64_t count, const Rules& rules, const ColumnArrays& columns) const override {
    ++launches;
    for (int64_t j = 0; j < count; ++j)
      needs_no_shift(rules.scoring.clip) ? finish_column<false>(columns, j) : finish_column<true>(columns, j);
  }

  void multiply(const Products& all, Element element, const float* factor) const override {
    ++launches;
    for (int i = 0; i < 2; ++i) {
      if (*factor == 1.0f || all.count[i] == 0) continue;
      const at::Tensor x = at::from_blob(all.x[i], {all.count[i]}, at::TensorOptions(type_of(element)));
      x.copy_(x.to(at::kFloat).mul_(*factor));
    }
  }

  void unit_rows(const Units& all, Element element) const override {
    ++launches;
    CtaEmulator group{kUnitThreads};
    with_numbers(element, [&](auto numbers) {
      for (int64_t g = 0; g < all.groups(); ++g) cuda::unit_rows<decltype(numbers)>(group, all, g);
    });
  }

  void through_rows(const Throughs& all, Element element) const override {
    ++launches;
    CtaEmulator group{kUnitThreads};
    with_numbers(element, [&](auto numbers) {
      for (int64_t g = 0; g < all.q.rows + all.k.rows; ++g) through_row<decltype(numbers)>(group, all, g);
    });
  }

  void summarize(const Summaries& all) const override {
    launches += all.ctas > 1 ? 2 : 1;
    CtaEmulator group{kSummaryThreads};
    for (int g = 0; g < all.ctas; ++g) sum_up(group, all, g);
    if (all.ctas > 1) sum_up_ctas(group, all);
  }
};

}  // namespace

std::unique_ptr<Machine> emulated_machine() { return another ? another() : std::make_unique<Emulator>(); }
void emulate_by(MakeMachine make) { another = make; }
int64_t emulated_launches() { return launches; }

}  // namespace cuda
}  // namespace fused_nce
