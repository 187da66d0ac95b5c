// The operators, their checks, and the module that says what was built.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <tuple>

#include "atoms.h"
#include "cpu/isa.h"
#include "cpu/prefixes.h"
#include "cpu/sweep.h"
#include "cuda/machines.h"
#include "cuda/plan.h"
#include "loss.h"
#include "results.h"

namespace fused_nce {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Names = std::vector<int64_t>;
using StatisticTuple = std::tuple<Tensor, Tensor, Tensor>;
using GradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

StatisticTensors checked(const char* pos_name, const Tensor& pos, const char* rows_name, const Tensor& rows,
                         const char* columns_name, const Tensor& columns, const SweepInputs& in) {
  const int64_t n = in.q.size(0), m = in.k.size(0);
  return {coefficients(pos_name, pos, {n, in.layout.n_pos}),
          coefficients(rows_name, rows, {static_cast<int64_t>(in.wanted.rows.size()), n}),
          coefficients(columns_name, columns, {static_cast<int64_t>(in.wanted.columns.size()), m})};
}

// The arguments that the operators begin with.
#define FUSED_NCE_SCORES                                                                                         \
  const Tensor &q, const Tensor &k, double scale, FUSED_NCE_LAYOUT, double bias, FUSED_NCE_FILTERS, Names stats, \
      Names columns
#define FUSED_NCE_SCORES_GIVEN \
  q, k, scale, FUSED_NCE_LAYOUT_GIVEN, bias, FUSED_NCE_FILTERS_GIVEN, std::move(stats), std::move(columns)
#define FUSED_NCE_SCORES_SCHEMA                                                                       \
  "Tensor q, Tensor k, float scale, " FUSED_NCE_LAYOUT_SCHEMA "float bias, " FUSED_NCE_FILTERS_SCHEMA \
  "int[] stats, int[] columns, "

SweepInputs score_inputs(FUSED_NCE_SCORES, bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes,
                         double hardness, int64_t parts = 1) {
  check_names("stats", stats);
  check_names("columns", columns);
  TORCH_CHECK_VALUE(bias == 0.0 || clip == 0.0, "bias is ", bias, ", needed: 0 beside a clip");
  Layout layout = layout_of(q, k, n_c, row_ids, itself, positives, column_ids);
  if (several) layout.n_pos = 0, layout.by_marks = true;
  SweepInputs in = inputs(q, k, scale, n_c, rows_per_image, offset, clip, need_q, need_k || (q.is_same(k) && need_q),
                          need_scale, workspace_bytes, std::move(layout));
  in.scoring.bias = static_cast<float>(bias);
  in.scoring.hardness = hardness_of(hardness, clip == 0.0 && bias == 0.0);
  in.wanted = {std::move(stats), std::move(columns)};
  in.filters = filters_of(q, k, FUSED_NCE_FILTERS_GIVEN, parts);
  TORCH_CHECK_VALUE(in.wanted.columns.empty() || (!in.filters.any() && hardness == 0.0), "columns are ",
                    in.wanted.columns, ", needed: none beside filters or hardness");
  return in;
}

StatisticTuple cpu_stats(FUSED_NCE_SCORES, int64_t workspace_bytes, double hardness) {
  const auto in = score_inputs(FUSED_NCE_SCORES_GIVEN, false, false, false, workspace_bytes, hardness);
  const StatisticTensors out = new_statistics(in);
  sweep(in, {true, false, out, {}, {}, {}});
  return {out.pos, out.rows, out.columns};
}

GradientTuple gradients(const SweepInputs& in, const Gradients& out) {
  return {out.dq, in.shared && in.need_q ? at::empty({0}, out.dq.options()) : out.dk, out.dscale, out.dbias};
}

GradientTuple cpu_grads(FUSED_NCE_SCORES, const Tensor& pos, const Tensor& found_rows, const Tensor& found_columns,
                        const Tensor& d_pos, const Tensor& d_rows, const Tensor& d_columns, bool need_q, bool need_k,
                        bool need_scale, int64_t workspace_bytes, double hardness, bool wide) {
  auto in = score_inputs(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_scale, workspace_bytes, hardness);
  in.wide = wide;
  const Gradients out = new_gradients_of(in, false);
  if (in.need_q || in.need_k || in.need_scale)
    sweep(in, {false,
               true,
               checked("pos", pos, "rows", found_rows, "columns", found_columns, in),
               checked("d_pos", d_pos, "d_rows", d_rows, "d_columns", d_columns, in),
               {},
               out});
  return gradients(in, out);
}

LossTuple cpu_loss(FUSED_NCE_SCORES, const std::string& tail, double unit, double square_weight, bool need_q,
                   bool need_k, bool need_scale, int64_t workspace_bytes, double hardness) {
  const auto in = score_inputs(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_scale, workspace_bytes, hardness);
  const unsigned columns_found = Wanted::mask(in.wanted.columns);
  TORCH_CHECK_VALUE(columns_found == 0 || (tail == "nce" && columns_found & bit_of(kNegLse) && in.layout.n_pos > 0),
                    "columns are ", in.wanted.columns,
                    ", needed: none, or neg_lse beside the tail nce, which halves it both ways");
  const StatisticTensors found = new_statistics(in);
  const Gradients out = new_gradients_of(in, true);
  sweep(in, {true,
             in.need_q || in.need_k || in.need_scale,
             found,
             {},
             tail_rule(tail_named(tail), unit, square_weight, in.wanted),
             out});
  const auto [dq, dk, dscale, dbias] = gradients(in, out);
  return {found.pos, found.rows, dq, dk, dscale, dbias, found.columns};
}

PrefixTuple cpu_prefixes(FUSED_NCE_SCORES, FUSED_NCE_PREFIXES) {
  const auto in = score_inputs(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_sums, workspace_bytes, hardness,
                               static_cast<int64_t>(widths.size()));
  TORCH_CHECK_TYPE(in.q.scalar_type() == at::kFloat, "q is ", in.q.scalar_type(), ", needed: float32");
  TORCH_CHECK_VALUE((Wanted::mask(in.wanted.rows) & ~kFused) == 0 && !in.layout.positives.defined() && bias == 0.0,
                    "stats are ", in.wanted.rows, ", needed: neg_lse, neg_max and square alone, of columns");
  const PrefixTask task =
      prefix_task(in, static_cast<int64_t>(in.wanted.rows.size()), of_q, of_k, std::move(widths), weights, unit, found);
  sweep_prefixes(in, task);
  return results_of(task);
}

// One atom over a float tensor, for the parity test with its twin in torch: (value, derivative), or (value,).
std::vector<Tensor> atom(const std::string& name, const Tensor& x, double parameter) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && x.is_contiguous(), "x is ", x.scalar_type(),
                   ", needed: a contiguous float32 tensor");
  const Tensor value = at::empty_like(x), slope = at::empty_like(x);
  const float* in = x.data_ptr<float>();
  float *v = value.data_ptr<float>(), *d = slope.data_ptr<float>();
  const float clip = static_cast<float>(parameter);
  for (int64_t i = 0; i < x.numel(); ++i) {
    if (name == "exp") {
      v[i] = d[i] = portable::exp_value(in[i]);
    } else if (name == "tanh_clip") {
      const auto t = portable::tanh_clip(in[i], clip, 1.0f / clip);
      v[i] = t.value;
      d[i] = t.slope;
    } else if (name == "softplus") {
      v[i] = portable::softplus(in[i]);
      d[i] = portable::sigmoid(in[i]);
    } else if (name == "sigmoid") {
      v[i] = portable::sigmoid(in[i]);
      d[i] = v[i] * portable::sigmoid(-in[i]);
    } else {
      TORCH_CHECK_VALUE(false, "name is '", name, "', needed: exp, tanh_clip, softplus or sigmoid");
    }
  }
  return {value, slope};
}

pybind11::dict plan(int64_t rows, int64_t columns, int64_t width, at::ScalarType dtype, int64_t workspace_bytes,
                    int64_t image, bool statistics, bool need_q, bool need_k, bool need_scale, bool shared, bool labels,
                    bool symmetric, bool marked, bool guided, const Names& row_stats, const Names& column_stats) {
  const bool gradients = need_q || need_k || need_scale;
  Work work{rows,   columns, width,  image,  elements_of(dtype, width), statistics && gradients,   gradients,
            need_q, need_k,  shared, labels, Wanted::mask(row_stats),   Wanted::mask(column_stats)};
  work.symmetric = symmetric && work.both;
  work.marked = marked;
  work.guided = guided;
  Plan p = make_plan(work, workspace_bytes);
  const Shares shares = shares_of(work, p);
  if (shared && work.both && !symmetric && !marked) {  // the values of ids decide whether scores are symmetric
    Work mirrored = work;
    mirrored.symmetric = true;
    const Plan other = make_plan(mirrored, workspace_bytes);
    if (p.lanes > 0) p.bytes = std::max(p.bytes, other.bytes);
  }
  pybind11::dict out;
  out["fits"] = p.lanes > 0;
  out["strip_rows"] = p.lanes;
  out["strips"] = p.strips;
  out["tile_columns"] = p.tile_columns;
  out["tiles"] = p.tiles;
  out["groups"] = p.groups;
  out["scores_stored"] = p.stored;
  out["strips_kept"] = p.kept_strips;
  out["total_bytes"] = p.bytes;
  out["shares"] = pybind11::make_tuple(shares.seen, shares.again, shares.for_keys);
  return out;
}

pybind11::dict cuda_plan(int64_t rows, int64_t columns, int64_t width, int64_t positives, int64_t element_bytes,
                         int64_t workspace_bytes, bool statistics, bool gradients, int64_t sums, bool column_stats,
                         bool optional, bool marked) {
  const cuda::Work work{.rows = rows,
                        .columns = columns,
                        .width = width,
                        .positives = positives,
                        .element_bytes = element_bytes,
                        .statistics = statistics,
                        .gradients = gradients,
                        .sums = sums,
                        .column_stats = column_stats,
                        .optional = optional,
                        .marked = marked};
  const cuda::Plan p = cuda::make_plan(work, workspace_bytes);
  pybind11::dict out;
  out["fits"] = p.fits;
  out["strip_rows"] = p.strip;
  out["block_rows"] = p.block;
  out["panel_columns"] = p.panel;
  out["panels"] = p.panels;
  out["ctas_per_row"] = p.ctas_per_row;
  out["threads"] = p.threads;
  out["score_bytes"] = p.score_bytes;
  out["total_bytes"] = p.bytes;
  out["sum_bytes"] = p.sum_bytes;
  return out;
}

// Of the plan of several prefixes on a GPU; more than the limit where none fits.
int64_t cuda_prefix_bytes(int64_t rows, int64_t columns, int64_t positives, int64_t parts, int64_t element_bytes,
                          bool gradients, bool marked, int64_t workspace_bytes) {
  return cuda::plan_prefixes({rows, columns, positives, parts, element_bytes, gradients, marked}, workspace_bytes)
      .bytes;
}

// `sm_90,compute_90` as text: what setup.py asked nvcc for.
#define FUSED_NCE_TEXT_OF(...) #__VA_ARGS__
#define FUSED_NCE_TEXT(...) FUSED_NCE_TEXT_OF(__VA_ARGS__)

pybind11::dict build_info() {
  pybind11::dict out;
  out["torch_version"] = TORCH_VERSION;
#if defined(__clang__)
  out["compiler"] = "clang " __clang_version__;
#else
  out["compiler"] = "gcc " __VERSION__;
#endif
  out["isa_compiled"] = compiled_isas();
  out["isa_active"] = active_kernels().name;
#ifdef FUSED_NCE_CUDA
  out["cuda"] = true;
  out["cuda_architectures"] = FUSED_NCE_TEXT(FUSED_NCE_ARCHITECTURES);
#else
  out["cuda"] = false;
  out["cuda_architectures"] = "";
#endif
#ifdef FUSED_NCE_EMULATION
  out["cuda_emulation"] = true;
#else
  out["cuda_emulation"] = false;
#endif
  out["bf16_hardware"] = has_bf16_gemm();
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_nce, m) {
  m.def("cpu_stats(" FUSED_NCE_SCORES_SCHEMA
        "int workspace_bytes, float hardness=0.0) -> (Tensor pos, Tensor rows, Tensor columns)");
  m.def("cpu_grads(" FUSED_NCE_SCORES_SCHEMA
        "Tensor pos, Tensor found_rows, Tensor found_columns, Tensor d_pos, Tensor d_rows, Tensor d_columns, "
        "bool need_q, bool need_k, bool need_scale, int workspace_bytes, float hardness=0.0, bool wide=False) -> "
        "(Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)");
  m.def("cpu_prefixes(" FUSED_NCE_SCORES_SCHEMA FUSED_NCE_PREFIXES_SCHEMA);
  m.def("cpu_loss(" FUSED_NCE_SCORES_SCHEMA
        "str tail, float unit, float square_weight, bool need_q, bool need_k, bool need_scale, int workspace_bytes, "
        "float hardness=0.0) -> "
        "(Tensor pos, Tensor rows, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias, Tensor columns)");
}

TORCH_LIBRARY_IMPL(fused_nce, CPU, m) {
  m.impl("cpu_stats", &cpu_stats);
  m.impl("cpu_grads", &cpu_grads);
  m.impl("cpu_loss", &cpu_loss);
  m.impl("cpu_prefixes", &cpu_prefixes);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.def("build_info", &build_info);
  m.def("gemm_flop", &flop_of_gemms, "FLOP of all the GEMMs that the CPU kernels have run in this process");
  m.def("atom", &atom, py::arg("name"), py::arg("x"), py::arg("parameter") = 1.0);
  m.def("plan", &plan, py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("dtype"),
        py::arg("workspace_bytes"), py::kw_only(), py::arg("image") = 1, py::arg("statistics") = true,
        py::arg("need_q") = true, py::arg("need_k") = true, py::arg("need_scale") = false, py::arg("shared") = false,
        py::arg("labels") = false, py::arg("symmetric") = false, py::arg("marked") = false, py::arg("guided") = false,
        py::arg("row_stats") = Names{kNegLse, kNegMax, kSquare}, py::arg("column_stats") = Names{});
  m.def("prefix_workspace_bytes", &prefix_workspace_bytes, "of the plan of several prefixes; 0 where none fits");
  m.def("prefix_norms", &prefix_norms, py::call_guard<py::gil_scoped_release>(),
        "(K, N) inverse norms of (N, D) float rows' prefixes");
  m.def("less_prefix_norms", &less_prefix_norms, py::call_guard<py::gil_scoped_release>(),
        "takes the norms' part off a gradient of unnormalised products");
  m.def(
      "names",
      [] {
        return std::make_pair(std::vector<std::string>(kStatisticNames, kStatisticNames + kStatistics),
                              std::vector<std::string>(kTailNames, kTailNames + kTails));
      },
      "the statistics and the tails that the kernels know, in the order of their numbers");
  bind_loss(m);
#ifdef FUSED_NCE_EMULATION
  m.def("cuda_emulated_launches", &cuda::emulated_launches,
        "launches that a GPU would have made for what this process has emulated");
  m.def(
      "cuda_emulate_by", [](uintptr_t make) { cuda::emulate_by(reinterpret_cast<cuda::MakeMachine>(make)); },
      "the address of a function that makes the machine to emulate a GPU by; 0: the package's own again");
  m.def(
      "cuda_tally",
      [](bool begin) {
        pybind11::dict out;
        for (const auto& [kernel, c] : cuda::tally(begin))
          out[py::str(kernel)] = py::make_tuple(c.launches, c.scores, c.flop, c.bytes, c.strip_bytes, c.strip);
        return out;
      },
      "by kernel: launches, scores, FLOP, bytes, bytes of scores, of a strip's; from now on calls are counted, or emulated");
#endif
  m.def("cuda_prefix_bytes", &cuda_prefix_bytes);
  m.def("cuda_kept_bytes", pybind11::overload_cast<int64_t, int, float, int64_t>(&cuda::kept_bytes), py::arg("stride"),
        py::arg("threads"), py::arg("clip"), py::arg("shared_bytes") = cuda::kSharedBytes,
        "of a row's scores in shared memory; 0 where they stay in the strip");
  m.def("cuda_plan", &cuda_plan, py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("positives"),
        py::arg("element_bytes"), py::arg("workspace_bytes"), py::kw_only(), py::arg("statistics") = true,
        py::arg("gradients") = true, py::arg("sums") = 1, py::arg("column_stats") = false, py::arg("optional") = false,
        py::arg("marked") = false);
}

}  // namespace fused_nce
