// A loss as one differentiable function of plain CPU tensors: normalisation, statistics, tail, report and all
// gradients, which leave with the forward and wait in the node. It is the fast way of an eager call; what it does not
// serve (a trace, a transform, a mode, a subclass, another dtype, a bad argument) it leaves, untouched, to the operator
// in Python, which says what is wrong or finds another backend.
#include "loss.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>

#ifdef FUSED_NCE_EMULATION
#include "cuda/whole.h"
#endif
#include "results.h"
#include "served.h"
#include "unit_rows.h"

namespace fused_nce {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::variable_list;

std::optional<Tensor> optional_of(const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; }

// fault: whole-stash-half
at::ScalarType waits_in(const Tensor& x) { return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type(); }

// One problem, from given tensors to results in the accumulation dtype.
class Pass {
 public:
  Pass(const Call& call, const Given& x) : call_(call), form_(*call.form), x_(x) {
    Tensor q = x.q, k = x.k.defined() ? x.k : x.q;
    const bool on_the_way = divides(call, x), prefixes = !form_.widths.empty();
    if (on_the_way) {
      q = with_rows(q);
      k = x.k.defined() ? with_rows(k) : q;
      unit_q_.norms = norms_of(q);
      unit_k_.norms = x.k.defined() ? norms_of(k) : unit_q_.norms;
    } else if (call.normalize) {
      unit_q_ = unit_rows(x.q);
      if (x.k.defined() && !x.own_keys.defined()) unit_k_ = unit_rows(x.k);
      q = unit_q_.wide.to(x.q.scalar_type());
      k = !x.k.defined() ? q : unit_k_.wide.defined() ? unit_k_.wide.to(x.k.scalar_type()) : x.k;
    } else if (prefixes) {
      q = q.to(at::kFloat);
      k = x.k.defined() ? k.to(at::kFloat) : q;
    }
    scale_ = static_cast<float>(call.scale);
    if (x.scale_tensor.defined()) scale_ *= x.scale_tensor.to(at::kFloat).item<float>();
    const float bias = x.bias.defined() ? x.bias.to(at::kFloat).item<float>() : 0.0f;
    if (x.own_keys.defined()) {
      own_ =
          call.normalize ? unit_rows(x.own_keys).wide.to(x.q.scalar_type()).to(at::kFloat) : x.own_keys.to(at::kFloat);
      products_ = (q.to(at::kFloat) * own_).sum(1, true);
      positives_ = products_ * scale_;
    } else if (x.positives.defined()) {
      positives_ = x.positives.to(at::kFloat).clone();
    }
    if (positives_.defined()) {
      if (form_.clip > 0.0) positives_ = at::tanh(positives_ / form_.clip) * form_.clip + positives_ * 0.0f;
      if (form_.biased) positives_ += bias;
    }
    const bool shared = !x.k.defined() && !prefixes;  // whose sweep takes them for two
    const auto& needs = call.needs;
    const bool need_q = needs[0], need_scale = needs[2] || needs[3];
    const int64_t itself = form_.drop_self ? call.offset * form_.n_c : -1;
    // Two tensors, or the sweep would take them for one in both roles.
    const Tensor keys = shared ? q : k.is_same(q) ? k.alias() : k;
    in_ = std::make_unique<SweepInputs>(inputs(q, keys, scale_, form_.n_c, form_.rows_per_image,
                                               form_.layout == LayoutKind::block ? call.offset : 0, form_.clip, need_q,
                                               x.k.defined() ? needs[1] : need_q, need_scale, call.workspace_bytes,
                                               layout_of(q, keys, form_.n_c, optional_of(x.row_ids), itself,
                                                         optional_of(positives_), optional_of(x.column_ids))));
    in_->scoring.bias = bias;
    in_->scoring.hardness = static_cast<float>(form_.hardness);  // fault: whole-without-hardness
    in_->wanted = form_.wanted;
    in_->shared = shared;
    if (on_the_way) in_->q_norms = unit_q_.norms, in_->k_norms = unit_k_.norms;
  }

  const SweepInputs& in() const { return *in_; }

  int64_t elements() const { return in_->q.size(0) * elements_a_row(form_.tail, in_->layout); }

  StatisticTensors statistics(Gradients& out, Tensor& d_pos) {
    if (!form_.widths.empty()) return of_prefixes({}, out);
    const StatisticTensors found = new_statistics(*in_);
    out = new_gradients_of(*in_, true);
    const double unit = form_.tail.unit(elements());
    const double pairs = static_cast<double>(in_->q.size(0)) * static_cast<double>(in_->k.size(0));
    sweep(*in_, {true,
                 any_gradient(*in_),
                 found,
                 {},
                 tail_rule(form_.tail.name, unit, form_.tail.penalty / pairs, in_->wanted),
                 out});
    if (positives_.defined() && (any_gradient(*in_) || call_.needs[4]))
      d_pos = slopes_of(form_.tail, *in_, found, at::scalar_tensor(unit, floats(in_->q)), 1.0).pos;
    return found;
  }

  // The scores once more, from the gradients of the parts.
  variable_list again(const StatisticTensors& found, const Tensor& d_loss, const Tensor& d_nce,
                      const Tensor& d_penalty) {
    const TailOf& tail = form_.tail;
    const double on_loss = d_loss.defined() ? d_loss.item<double>() : 0.0;
    const double mean = tail.reduction == Reduction::mean ? tail.weight / static_cast<double>(elements()) : tail.weight;
    Tensor d_element = at::scalar_tensor(on_loss * tail.unit(elements()), floats(in_->q));
    if (d_nce.defined()) d_element = d_element + d_nce.to(at::kFloat) * mean;
    const double d_sum = on_loss + (d_penalty.defined() ? d_penalty.item<double>() : 0.0);  // fault: whole-penalty
    const StatisticTensors d = slopes_of(tail, *in_, found, d_element, d_sum);
    Gradients out;
    if (!form_.widths.empty()) {
      of_prefixes({found.pos, found.rows, d.pos, d.rows}, out);
    } else {
      out = new_gradients_of(*in_, false);
      if (any_gradient(*in_)) sweep(*in_, {false, true, found, d, {}, out});
    }
    return finish(out, d.pos);
  }

  // Of q, k, scale_tensor, bias and positives, in what they wait in; undefined where not wanted.
  variable_list finish(const Gradients& out, const Tensor& d_pos) const {
    variable_list g(5);
    const auto& needs = call_.needs;
    Tensor through;  // dL/d raw positive
    if (d_pos.defined() && positives_.defined())
      through = form_.clip > 0.0 ? d_pos * (1 - (positives_ / form_.clip).square()) : d_pos;
    if (needs[0]) {
      Tensor dq = out.dq;
      if (own_.defined()) dq.add_((through * scale_) * own_);
      if (call_.normalize) through_unit_rows(dq, unit_q_, in_->q);  // fault: whole-normalised-gradient
      g[0] = dq.to(waits_in(x_.q));
    }
    if (needs[1] && x_.k.defined()) {
      Tensor dk = out.dk;
      if (unit_k_.norms.defined()) through_unit_rows(dk = dk.to(at::kFloat), unit_k_, in_->k);
      g[1] = dk.to(waits_in(x_.k));
    }
    if (needs[2]) {
      g[2] = out.dscale * call_.scale;
      if (own_.defined()) g[2] = g[2] + (through * products_).sum() * call_.scale;  // fault: whole-scale-own
    }
    if (needs[3]) g[3] = d_pos.defined() && positives_.defined() ? out.dbias + d_pos.sum() : out.dbias;
    if (needs[4]) g[4] = through;
    return g;
  }

 private:
  // The statistics of all prefixes, or the gradients of `given` ones and dL/d statistic; each has norms of its own.
  StatisticTensors of_prefixes(const variable_list& given, Gradients& out) const {
    const auto& widths = form_.widths;
    const int64_t n = in_->q.size(0), parts = static_cast<int64_t>(widths.size());
    const bool shared = !x_.k.defined();
    variable_list found;  // (K, N, P), (K, S, N)
    for (const Tensor& x : given)
      found.push_back(found.size() % 2 ? x.view({parts, -1, n}) : x.view({n, parts, -1}).transpose(0, 1));
    const Tensor of_q = prefix_norms(in_->q, widths), of_k = shared ? of_q : prefix_norms(in_->k, widths);
    const PrefixTask task =
        prefix_task(*in_, static_cast<int64_t>(in_->wanted.rows.size()), of_q, of_k, widths,
                    given.empty() ? form_.tail.weights : std::vector<double>{}, form_.tail.unit(elements()), found);
    sweep_prefixes(*in_, task);
    out = task.out;
    if (in_->need_q) less_prefix_norms(out.dq, in_->q, of_q, task.row_sums * scale_, widths);
    if (in_->need_k) less_prefix_norms(out.dk, in_->k, of_k, task.line_sums * scale_, widths);
    if (in_->need_scale) out.dscale = task.row_sums.sum();
    if (shared && in_->need_q) out.dq.add_(out.dk);  // fault: whole-prefix-shared
    return {task.pos.transpose(0, 1).reshape({n, -1}), task.rows.flatten(0, 1),
            at::empty({0, in_->k.size(0)}, of_k.options())};
  }

  const Call& call_;
  const Form& form_;
  const Given& x_;
  UnitRows unit_q_, unit_k_;
  Tensor own_, products_, positives_;  // (N, D), (N, 1) before the scale, (N, P) transformed
  float scale_ = 1.0f;
  std::unique_ptr<SweepInputs> in_;
};

// No transform, no autocast and no graph within.
struct Below {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{at::autocast::get_autocast_dispatch_key_from_device_type(at::kCPU)};
};

struct Found {
  LossNumbers numbers;
  StatisticTensors statistics;
  variable_list stash;
};

Found forward(const Call& call, const Given& x) {
  const Below below;
  RECORD_USER_SCOPE("fused_nce::loss[cpu]");
  Pass pass(call, x);
  Gradients out;
  Tensor d_pos;
  Found found;
  found.statistics = pass.statistics(out, d_pos);
  found.numbers = summary_of(call.form->tail, pass.in(), found.statistics, call.report_groups);
  found.stash = pass.finish(out, d_pos);
  return found;
}

bool batched(const Tensor& x) {
  return x.defined() &&
         x.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

// stash * upstream, in the stash's own memory unless the graph is kept for another backward.
Tensor times(const Tensor& stash, const Tensor& upstream, bool kept) {
  if (kept || batched(upstream)) return stash * upstream;  // fault: whole-stash-in-place
  return upstream.item<double>() == 1.0 ? stash : stash.mul_(upstream);
}

struct Loss : torch::autograd::Function<Loss> {
  using Leaf = std::optional<Tensor>;

  static variable_list forward(torch::autograd::AutogradContext* ctx, const Leaf&, const Leaf&, const Leaf&,
                               const Leaf&, const Leaf&, const c10::intrusive_ptr<Call>& call, const Given& x) {
    Found found = fused_nce::forward(*call, x);
    ctx->set_materialize_grads(false);
    variable_list saved = found.stash, kept{x.q,
                                            x.k,
                                            x.scale_tensor,
                                            x.bias,
                                            x.positives,
                                            x.own_keys,
                                            x.row_ids,
                                            x.column_ids,
                                            found.statistics.pos,
                                            found.statistics.rows,
                                            found.statistics.columns};
    if (call->parts) saved.insert(saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    const LossNumbers& n = found.numbers;
    variable_list logs{n.report, found.statistics.pos, found.statistics.rows};
    if (!call->parts) logs.insert(logs.end(), {n.nce, n.penalty});
    ctx->mark_non_differentiable(logs);
    return {n.loss, n.nce, n.penalty, n.report, found.statistics.pos, found.statistics.rows};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& d) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "fused_nce: double backward (create_graph=True) is not supported: the gradients leave with the forward "
                "and carry no graph of their own; backend='chunked' has one");
    variable_list found(7);
    const variable_list saved = ctx->get_saved_variables();
    const auto& needs = call->needs;
    if (d[1].defined() || d[2].defined()) {
      // A reported part was differentiated on its own: the stash, at upstream 1 on the sum, cannot serve it.
      TORCH_CHECK(!batched(d[0]) && !batched(d[1]) && !batched(d[2]),
                  "fused_nce: batched upstream gradients (is_grads_batched, vmap) are supported for `loss` alone: this "
                  "backward computes the scores again, for one upstream at a time");
      const Below below;
      RECORD_USER_SCOPE("fused_nce::grads[cpu]");
      const Given x{saved[5], saved[6], saved[7], saved[8], saved[9], saved[10], saved[11], saved[12]};
      Pass pass(*call, x);
      // fault: whole-saved-mixed
      const variable_list g = pass.again({saved[13], saved[14], saved[15]}, d[0], d[1], d[2]);
      std::copy(g.begin(), g.end(), found.begin());
    } else if (d[0].defined()) {
      const bool kept = torch::autograd::get_current_graph_task_keep_graph();
      for (size_t i = 0; i < needs.size(); ++i)
        if (needs[i] && saved[i].defined()) found[i] = times(saved[i], d[0], kept);
    }
    for (size_t i = 0; i < needs.size(); ++i)
      if (found[i].defined()) found[i] = found[i].to(call->dtypes[i]);
    return found;
  }
};

// ---- what is served ----------------------------------------------------------------------------------------------

c10::DispatchKeySet plain_keys(c10::BackendComponent device) {
  return c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) | c10::DispatchKeySet(c10::DispatchKey::Dense) |
         c10::DispatchKeySet(device) | c10::getAutogradRelatedKeySetFromBackend(device) |
         c10::getAutocastRelatedKeySetFromBackend(device);
}

// A dense tensor that nothing stands behind: no subclass, transform, lazy sign or tangent. False: something does.
bool read(py::handle object, Tensor& out) {
  if (object.is_none()) return true;
  if (!THPVariable_CheckExact(object.ptr())) return false;
  out = THPVariable_Unpack(object.ptr());
  static const c10::DispatchKeySet plain =
      plain_keys(c10::BackendComponent::CPUBit) | plain_keys(c10::BackendComponent::CUDABit);
  return (out.key_set().raw_repr() & ~plain.raw_repr()) == 0 && !out._fw_grad(0).defined();
}

// Rows in its own dtype are as it would make them.
bool autocast_has_a_say(const Tensor& q) {
  const auto device = q.device().type();
  return at::autocast::is_autocast_enabled(device) && q.scalar_type() != at::autocast::get_autocast_dtype(device);
}

// Nothing watches the calls of operators or changes what they do.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::jit::tracer::isTracing();
}

// Empty: this call is not served.
variable_list run_on_gpu([[maybe_unused]] const c10::intrusive_ptr<Call>& call, [[maybe_unused]] const Given& x) {
#ifdef FUSED_NCE_EMULATION
  const py::gil_scoped_release others;
  if (cuda::serves(*call->form, *call, x)) return cuda::whole_loss(call, x);
#endif
  return {};
}

variable_list run_on_cpu(const c10::intrusive_ptr<Call>& call, const Given& x) {
  if (!x.q.is_cpu() || call->workspace_bytes == 0 || !sound(*call->form, *call, x) || !fits(*call->form, *call, x))
    return {};
  const py::gil_scoped_release others;
  if (std::any_of(call->needs.begin(), call->needs.end(), [](bool need) { return need; }))
    return Loss::apply(optional_of(x.q), optional_of(x.k), optional_of(x.scale_tensor), optional_of(x.bias),
                       optional_of(x.positives), call, x);
  const Found found = forward(*call, x);
  const LossNumbers& n = found.numbers;
  return {n.loss, n.nce, n.penalty, n.report, found.statistics.pos, found.statistics.rows};
}

// (loss, nce, penalty, report by name, pos, rows), or None for what is not served.
py::object loss(const std::shared_ptr<Form>& form, py::handle q, py::handle k, py::handle scale_tensor, py::handle bias,
                py::handle positives, py::handle own_keys, py::handle row_ids, py::handle column_ids, double scale,
                int64_t offset, bool normalize, bool parts, int64_t report_groups, int64_t gpu_workspace_bytes,
                bool twins) {
  Given x;
  if (watched() || !read(q, x.q) || !x.q.defined() || !read(k, x.k) || !read(scale_tensor, x.scale_tensor) ||
      !read(bias, x.bias) || !read(positives, x.positives) || !read(own_keys, x.own_keys) ||
      !read(row_ids, x.row_ids) || !read(column_ids, x.column_ids) || !x.together() || autocast_has_a_say(x.q))
    return py::none();
  auto call = c10::make_intrusive<Call>();
  call->form = form;
  call->scale = scale;
  call->offset = offset;
  call->report_groups = report_groups;
  call->workspace_bytes = gpu_workspace_bytes ? gpu_workspace_bytes : workspace_limit();
  call->normalize = normalize;
  call->parts = parts;
  call->twins = twins;
  const bool graph = at::GradMode::is_enabled();
  const auto leaves = x.leaves();
  for (size_t i = 0; i < leaves.size(); ++i) {
    call->needs[i] = graph && leaves[i]->defined() && leaves[i]->requires_grad();
    call->dtypes[i] = leaves[i]->defined() ? leaves[i]->scalar_type() : at::kFloat;
  }
  const auto found = gpu_workspace_bytes ? run_on_gpu(call, x) : run_on_cpu(call, x);
  if (found.empty()) return py::none();
  py::dict report;
  const Tensor& numbers = found[3];
  const auto count = static_cast<int64_t>(form->report.size());
  {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int64_t j = 0; j < count; ++j)
      report[py::str(form->report[static_cast<size_t>(j)])] =
          report_groups == 1 ? numbers.as_strided({}, {}, j) : numbers.select(1, j);
  }
  return py::make_tuple(found[0], found[1], found[2], report, found[4], found[5]);
}

std::shared_ptr<Form> form_of(const std::string& layout, int64_t n_c, int64_t rows_per_image, int64_t positives,
                              bool drop_self, bool biased, double clip, double hardness, std::vector<int64_t> rows,
                              std::vector<int64_t> columns, const std::string& tail, double penalty, double weight,
                              const std::string& reduction, std::vector<std::string> report, const std::string& code,
                              std::vector<int64_t> widths, std::vector<double> weights) {
  const auto place = [](const std::string& name, std::initializer_list<const char*> names) {
    const auto found = std::find(names.begin(), names.end(), name);
    TORCH_CHECK_VALUE(found != names.end(), "got ", name, ", needed: one of ",
                      std::vector<std::string>(names.begin(), names.end()));
    return static_cast<int>(found - names.begin());
  };
  check_names("stats", rows);
  check_names("columns", columns);
  const auto kind = static_cast<LayoutKind>(place(layout, {"block", "index", "labels", "separate"}));
  const auto reduced = static_cast<Reduction>(place(reduction, {"mean", "sum", "none"}));
  auto form = std::make_shared<Form>(Form{kind,
                                          n_c,
                                          rows_per_image,
                                          positives,
                                          drop_self,
                                          biased,
                                          clip,
                                          hardness_of(hardness, clip == 0.0 && !biased && columns.empty()),
                                          {std::move(rows), std::move(columns)},
                                          {tail_named(tail), penalty, weight, reduced, std::move(weights)},
                                          std::move(report),
                                          code,
                                          std::move(widths)});
  const auto numbers =
      static_cast<size_t>(numbers_reported(form->tail.name)) * std::max<size_t>(1, form->widths.size());
  TORCH_CHECK_VALUE(form->report.size() == numbers, "report has ", form->report.size(), " names, needed: ", numbers);
  return form;
}

// A problem's statistics as the operators in Python have them; of its scores nothing but their places.
SweepInputs places_of(const Form& form, int64_t m, int64_t offset, const std::optional<Tensor>& row_ids,
                      const Tensor& pos) {
  const int64_t parts = std::max<int64_t>(1, static_cast<int64_t>(form.widths.size()));
  Layout layout{pos.size(1) / parts, {}, form.drop_self ? offset * form.n_c : -1, {}, {}};
  TORCH_CHECK_VALUE(row_ids.has_value() == (form.layout == LayoutKind::index), "row_ids: only an index has them");
  if (row_ids) layout.row_ids = row_ids->contiguous();
  if (form.layout == LayoutKind::separate) layout.positives = pos;
  const Scoring scoring{1.0f, 0.0f, form.n_c, form.rows_per_image, form.layout == LayoutKind::block ? offset : 0};
  const Tensor one = at::empty({1, 1}, pos.options());
  return {
      one.expand({pos.size(0), 1}), one.expand({m, 1}), scoring, layout, false, false, false, 1, false, form.wanted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> summary(const Form& form, int64_t m, int64_t offset,
                                                   const std::optional<Tensor>& row_ids, const Tensor& pos,
                                                   const Tensor& rows, const Tensor& columns, int64_t report_groups) {
  const py::gil_scoped_release others;
  const LossNumbers found = summary_of(form.tail, places_of(form, m, offset, row_ids, pos),
                                       {pos.contiguous(), rows.contiguous(), columns.contiguous()}, report_groups);
  return {found.loss, found.nce, found.penalty, found.report};
}

std::tuple<Tensor, Tensor, Tensor> slopes(const Form& form, int64_t m, int64_t offset,
                                          const std::optional<Tensor>& row_ids, const Tensor& pos, const Tensor& rows,
                                          const Tensor& columns, const Tensor& d_element, double d_penalty) {
  const py::gil_scoped_release others;
  const StatisticTensors found =
      slopes_of(form.tail, places_of(form, m, offset, row_ids, pos),
                {pos.contiguous(), rows.contiguous(), columns.contiguous()}, d_element, d_penalty);
  return {found.pos, found.rows, found.columns};
}

}  // namespace

void bind_loss(py::module_& m) {
  py::class_<Form, std::shared_ptr<Form>>(m, "Form", "A spec and a tail, read once")
      .def(py::init(&form_of), py::kw_only(), py::arg("layout"), py::arg("n_c"), py::arg("rows_per_image"),
           py::arg("positives"), py::arg("drop_self"), py::arg("biased"), py::arg("clip"), py::arg("hardness"),
           py::arg("rows"), py::arg("columns"), py::arg("tail"), py::arg("penalty"), py::arg("weight"),
           py::arg("reduction"), py::arg("report"), py::arg("code"), py::arg("widths"), py::arg("weights"));
  m.def("loss", &loss, py::arg("form"), py::arg("q"), py::arg("k"), py::arg("scale_tensor"), py::arg("bias"),
        py::arg("positives"), py::arg("own_keys"), py::arg("row_ids"), py::arg("column_ids"), py::arg("scale"),
        py::arg("offset"), py::arg("normalize"), py::arg("parts"), py::arg("report_groups"),
        py::arg("gpu_workspace_bytes") = 0, py::arg("twins") = false,
        "A loss as one differentiable function, or None for a call that it does not serve");
  m.def("summary", &summary, "(loss, nce, penalty, report) of a problem's statistics");
  m.def("slopes", &slopes, "dL/d statistic from dL/d element and dL/d penalty");
}

}  // namespace fused_nce
