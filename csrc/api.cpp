// The operators, their checks, and the module that says what was built.
#include <ATen/core/Tensor.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <tuple>

#include "atoms.h"
#include "cpu/isa.h"
#include "cpu/sweep.h"
#include "cuda/plan.h"

namespace fused_nce {
namespace {

using at::Tensor;
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GradientTuple = std::tuple<Tensor, Tensor, Tensor>;
using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics cpu_stats(const Tensor& q, const Tensor& k, double scale, int64_t n_c, int64_t rows_per_image,
                     int64_t offset, double clip, const std::optional<Tensor>& row_ids, int64_t itself,
                     const std::optional<Tensor>& positives, int64_t workspace_bytes) {
  const auto in = inputs(q, k, scale, n_c, rows_per_image, offset, clip, false, false, false, workspace_bytes,
                         layout_of(q, k, n_c, row_ids, itself, positives));
  const RowStatistics out = statistics_for(in);
  sweep_stats(in, out);
  return {out.pos, out.neg_lse, out.neg_max, out.square};
}

GradientTuple cpu_grads(const Tensor& q, const Tensor& k, double scale, int64_t n_c, int64_t rows_per_image,
                        int64_t offset, double clip, const std::optional<Tensor>& row_ids, int64_t itself,
                        const std::optional<Tensor>& positives, const Tensor& pos, const Tensor& neg_lse,
                        const Tensor& d_pos, const Tensor& d_neg_lse, const Tensor& d_square, bool need_q, bool need_k,
                        bool need_scale, int64_t workspace_bytes) {
  const auto in = inputs(q, k, scale, n_c, rows_per_image, offset, clip, need_q, need_k, need_scale, workspace_bytes,
                         layout_of(q, k, n_c, row_ids, itself, positives));
  const int64_t n = q.size(0), n_pos = in.layout.n_pos;
  const RowStatistics stats{coefficients("pos", pos, {n, n_pos}), coefficients("neg_lse", neg_lse, {n}), {}, {}};
  const Upstream upstream{coefficients("d_pos", d_pos, {n, n_pos}), coefficients("d_neg_lse", d_neg_lse, {n}),
                          coefficients("d_square", d_square, {n})};
  const Gradients out = new_gradients(in, dk_type(in, false));
  sweep_grads(in, stats, upstream, out);
  return {out.dq, out.dk, out.dscale};
}

LossTuple cpu_loss(const Tensor& q, const Tensor& k, double scale, int64_t n_c, int64_t rows_per_image, int64_t offset,
                   double clip, const std::optional<Tensor>& row_ids, int64_t itself,
                   const std::optional<Tensor>& positives, double nce_weight, double square_weight, bool need_q,
                   bool need_k, bool need_scale, int64_t workspace_bytes) {
  const auto in = inputs(q, k, scale, n_c, rows_per_image, offset, clip, need_q, need_k, need_scale, workspace_bytes,
                         layout_of(q, k, n_c, row_ids, itself, positives));
  const RowStatistics stats = statistics_for(in);
  const Upstream upstream{{}, {}, {}, static_cast<float>(nce_weight), static_cast<float>(square_weight)};
  const Gradients out = new_gradients(in, dk_type(in, true));
  sweep_loss(in, stats, upstream, out);
  return {stats.pos, stats.neg_lse, stats.neg_max, stats.square, out.dq, out.dk, out.dscale};
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
                    int64_t image, bool statistics, bool need_q, bool need_k, bool need_scale) {
  const bool gradients = need_q || need_k || need_scale;
  const Work work{rows, columns, width, image, elements_of(dtype, width), statistics && gradients, gradients,
                  need_q, need_k};
  const Plan p = make_plan(work, workspace_bytes);
  pybind11::dict out;
  out["fits"] = p.lanes > 0;
  out["strip_rows"] = p.lanes;
  out["strips"] = p.strips;
  out["tile_columns"] = p.tile_columns;
  out["tiles"] = p.tiles;
  out["groups"] = p.groups;
  out["scores_stored"] = p.stored;
  out["total_bytes"] = p.bytes;
  return out;
}

pybind11::dict cuda_plan(int64_t rows, int64_t columns, int64_t width, int64_t positives, int64_t element_bytes,
                         int64_t workspace_bytes, bool statistics, bool gradients, bool need_scale, bool both_ways) {
  const cuda::Work work{rows,       columns,   width,      positives, element_bytes,
                        statistics, gradients, need_scale, both_ways};
  const cuda::Plan p = cuda::make_plan(work, workspace_bytes);
  pybind11::dict out;
  out["fits"] = p.fits;
  out["strip_rows"] = p.strip;
  out["block_rows"] = p.block;
  out["panel_columns"] = p.panel;
  out["panels"] = p.panels;
  out["parts"] = p.parts;
  out["threads"] = p.threads;
  out["score_bytes"] = p.score_bytes;
  out["total_bytes"] = p.bytes;
  out["sum_bytes"] = p.sum_bytes;
  return out;
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
  out["bf16_hardware"] = has_bf16_gemm();
  return out;
}

}  // namespace

#define FUSED_NCE_SCORES \
  "Tensor q, Tensor k, float scale, int n_c, int rows_per_image, int offset, float clip, Tensor? row_ids, " \
  "int itself, Tensor? positives, "

TORCH_LIBRARY_FRAGMENT(fused_nce, m) {
  m.def(
      "cpu_stats(" FUSED_NCE_SCORES
      "int workspace_bytes) -> (Tensor pos, Tensor neg_lse, Tensor neg_max, Tensor square)");
  m.def(
      "cpu_grads(" FUSED_NCE_SCORES
      "Tensor pos, Tensor neg_lse, Tensor d_pos, Tensor d_neg_lse, Tensor d_square, bool need_q, bool need_k, "
      "bool need_scale, int workspace_bytes) -> (Tensor dq, Tensor dk, Tensor dscale)");
  m.def(
      "cpu_loss(" FUSED_NCE_SCORES
      "float nce_weight, float square_weight, bool need_q, bool need_k, bool need_scale, int workspace_bytes) -> "
      "(Tensor pos, Tensor neg_lse, Tensor neg_max, Tensor square, Tensor dq, Tensor dk, Tensor dscale)");
}

TORCH_LIBRARY_IMPL(fused_nce, CPU, m) {
  m.impl("cpu_stats", &cpu_stats);
  m.impl("cpu_grads", &cpu_grads);
  m.impl("cpu_loss", &cpu_loss);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.def("build_info", &build_info);
  m.def("gemm_flop", &flop_of_gemms, "FLOP of all the GEMMs that the CPU kernels have run in this process");
  m.def("atom", &atom, py::arg("name"), py::arg("x"), py::arg("parameter") = 1.0);
  m.def("plan", &plan, py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("dtype"),
        py::arg("workspace_bytes"), py::kw_only(), py::arg("image") = 1, py::arg("statistics") = true,
        py::arg("need_q") = true, py::arg("need_k") = true, py::arg("need_scale") = false);
  m.def("cuda_plan", &cuda_plan, py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("positives"),
        py::arg("element_bytes"), py::arg("workspace_bytes"), py::kw_only(), py::arg("statistics") = true,
        py::arg("gradients") = true, py::arg("need_scale") = true, py::arg("both_ways") = false);
}

}  // namespace fused_nce
