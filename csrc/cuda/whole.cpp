// The plain call on a GPU: norms and own scores in one launch, the sweep, the numbers of the loss; and in the backward
// one launch for what the upstream gradient meets. Nothing is read back.
#include "whole.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <map>
#include <string>

#include "ops.h"

namespace fused_nce {
namespace cuda {

namespace {

using at::Tensor;
using torch::autograd::variable_list;
using WholeCall = fused_nce::Call;

// No transform, no autocast and no graph within.
struct Below {
  explicit Below(const Tensor& q)
      : no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(q.device().type())) {}
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast;
};

bool batched(const Tensor& x) {
  return x.defined() &&
         x.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

void* data(const Tensor& x) { return x.defined() ? x.data_ptr() : nullptr; }
float* floats_of(const Tensor& x) { return static_cast<float*>(data(x)); }

// What the scores are made of. Undefined: not normalised, or nobody's.
struct Sides {
  Tensor q, k;                         // in the scores
  Tensor x_q, x_k, own;                // as given, rows of adjacent elements
  Tensor q_norms, k_norms, own_norms;  // (N), (M), (N)
  Tensor positives, products;          // (N, 1) of own keys; before a scale tensor, only with one
  Tensor scale;                        // a factor on the device
};

// One tensor in both roles.
bool is_shared(const WholeCall& call, const Given& x) { return call.twins || !x.k.defined(); }

Sides sides_of(const WholeCall& call, const Given& x, const Machine& machine) {
  const bool shared = is_shared(call, x);
  Sides out;
  out.q = out.x_q = with_rows(x.q);
  if (x.k.defined()) out.x_k = with_rows(x.k);
  out.k = shared ? out.q : out.x_k;
  // Two tensors, or the sweep would take them for one in both roles.
  if (!shared && out.k.is_same(out.q)) out.k = out.k.alias();
  if (x.scale_tensor.defined()) out.scale = x.scale_tensor.to(at::kFloat);
  if (!call.normalize) return out;
  const auto wide = floats(x.q);
  const int64_t width = x.q.size(1);
  const auto side = [&](const Tensor& from, const Tensor& to, Tensor& norms) -> UnitSide {
    norms = at::empty({from.size(0)}, wide);
    return {from.data_ptr(), from.stride(0), from.size(0), data(to), to.defined() ? to.stride(0) : 0, floats_of(norms)};
  };
  const auto room = [&](const Tensor& like) { return at::empty(like.sizes(), like.options()); };
  Units units{.width = width, .scale = static_cast<float>(call.scale), .scale_tensor = floats_of(out.scale)};
  if (call.twins) {  // the two of a row side by side
    const Tensor both = at::empty({x.q.size(0), 2, width}, x.q.options());
    units.q = side(out.x_q, both.select(1, 0), out.q_norms);
    units.k = side(out.x_k, both.select(1, 1), out.k_norms);  // fault: gpu-twins-apart
    out.q = out.k = both.view({-1, width});
  } else {
    units.q = side(out.x_q, out.q = room(out.x_q), out.q_norms);
    if (shared) out.k = out.q;
    else if (!x.own_keys.defined()) units.k = side(out.x_k, out.k = room(out.x_k), out.k_norms);
  }
  if (x.own_keys.defined()) {
    out.own = with_rows(x.own_keys);
    const Tensor both = at::empty({out.scale.defined() ? 2 : 1, x.q.size(0), 1}, wide);
    out.positives = both[0], out.products = both[-1];
    units.k = side(out.own, {}, out.own_norms);
    units.positives = floats_of(out.positives);
  }
  machine.unit_rows(units, element_of(x.q.scalar_type()));
  return out;
}

SweepInputs inputs_of(const WholeCall& call, const Sides& s, bool shared) {
  const Form& form = *call.form;
  const auto& needs = call.needs;
  const int64_t itself = form.drop_self ? call.offset * form.n_c : -1;
  std::optional<Tensor> positives;
  if (s.positives.defined()) positives = s.positives;
  SweepInputs in =
      inputs(s.q, s.k, call.scale, form.n_c, form.rows_per_image, form.layout == LayoutKind::block ? call.offset : 0,
             form.clip, needs[0] || (shared && needs[1]), !shared && needs[1], needs[2], call.workspace_bytes,
             layout_of(s.q, s.k, form.n_c, std::nullopt, itself, positives, std::nullopt));
  in.shared = shared;
  in.scoring.hardness = static_cast<float>(form.hardness);  // fault: gpu-whole-without-hardness
  return in;
}

struct Found {
  Tensor loss, nce, penalty, report, pos, rows;
  Tensor dq, dk, dscale;  // at upstream 1: of unit rows, where they were normalised
  Sides sides;
};

Found forward(const WholeCall& call, const Given& x) {
  const Below below(x.q);
  RECORD_USER_SCOPE("fused_nce::loss[cuda]");
  const MachineOnDevice machine(x.q);
  const Form& form = *call.form;
  Found out;
  out.sides = sides_of(call, x, *machine);
  const SweepInputs in = inputs_of(call, out.sides, is_shared(call, x));
  const int64_t n = in.q.size(0), m = in.k.size(0);
  const double unit = form.tail.unit(n * in.layout.n_pos), pairs = static_cast<double>(n) * static_cast<double>(m);
  const TailRule rule{kNce, static_cast<float>(unit), static_cast<float>(form.tail.penalty / pairs)};
  const Tensor rows = at::empty({kFirstOptional, n}, floats(in.q));
  out.pos = out.sides.positives.defined() ? out.sides.positives : at::empty({n, in.layout.n_pos}, floats(in.q));
  const OnDevice numbers{out.sides.scale, {}};
  Task task{.statistics = true,
            .gradients = in.need_q || in.need_k || in.need_scale,
            .rows = {.pos = out.pos,
                     .neg_lse = rows.select(0, kNegLse),
                     .neg_max = rows.select(0, kNegMax),
                     .square = rows.select(0, kSquare)},
            .upstream = {.tail = rule},
            .fp16_gain = fp16_gain_of(element_of(in.q.scalar_type()), peak_of(in, rule))};
  out.rows = rows.narrow(0, 0, static_cast<int64_t>(form.wanted.rows.size()));
  const int64_t n_c = form.layout == LayoutKind::block ? form.n_c : 1;
  const int64_t images = m / n_c + (form.layout == LayoutKind::separate);
  const Summing summed =
      summing({out.pos}, {out.rows}, {n_c}, {images}, {m}, {form.tail.weight}, {form.tail.penalty},
              form.tail.reduction != Reduction::sum, form.tail.reduction == Reduction::none, {call.report_groups});
  task.out = new_results(in, numbers, task);
  task.summary = &summed.all;
  if (!sweep(*machine, in, numbers, task)) machine->summarize(summed.all);
  out.loss = summed.loss, out.nce = summed.nce, out.penalty = summed.penalty, out.report = summed.report;
  const auto& needs = call.needs;
  // Where nothing is left to do but to meet the upstream gradient they wait in the inputs' type, float16 in float.
  const auto waits = [&](const Tensor& g) {
    return call.normalize || g.scalar_type() == x.q.scalar_type() || x.q.scalar_type() == at::kHalf
               ? g
               : g.to(x.q.scalar_type());
  };
  if (in.need_q) out.dq = waits(task.out.dq);
  if (in.need_k) out.dk = waits(task.out.dk);
  if (needs[2]) {
    out.dscale = task.out.dscale;
    if (out.sides.own.defined()) {
      const Tensor behind = out.rows.select(0, kNegLse).unsqueeze(1) - out.pos;
      out.dscale = out.dscale - (at::sigmoid(behind) * out.sides.products).sum() * unit;  // fault: gpu-whole-scale
    }
    out.dscale = out.dscale * call.scale;
  }
  return out;
}

// dL/dx of q and k from dL/d unit row, times the upstream gradient.
void through(const WholeCall& call, const Sides& s, const Tensor& pos, const Tensor& rows, Tensor dq, Tensor dk,
             const Tensor& upstream, Tensor& on_q, Tensor& on_k) {
  if (call.twins && dq.defined()) {
    const Tensor both = dq.view({-1, 2, dq.size(1)});
    dq = call.needs[0] ? both.select(1, 0) : Tensor();
    dk = call.needs[1] ? both.select(1, 1) : Tensor();
  }
  const auto side = [&](const Tensor& x, const Tensor& norms, const Tensor& gradient, Tensor& out) -> ThroughSide {
    if (!gradient.defined()) return {};
    out = at::empty(x.sizes(), x.options());
    const bool wide = gradient.scalar_type() == at::kFloat && x.scalar_type() != at::kFloat;
    return {x.data_ptr(),        x.stride(0),        x.size(0), floats_of(norms),
            gradient.data_ptr(), gradient.stride(0), wide,      out.data_ptr()};
  };
  const Tensor factor = upstream.to(at::kFloat);
  Throughs all{.q = side(s.x_q, s.q_norms, dq, on_q),
               .k = side(s.x_k, s.k_norms, dk, on_k),
               .width = s.x_q.size(1),
               .upstream = floats_of(factor),
               .pos = floats_of(pos),
               .neg_lse = floats_of(rows),
               .unit = static_cast<float>(call.form->tail.unit(s.x_q.size(0))),
               .scale = static_cast<float>(call.scale),
               .scale_tensor = floats_of(s.scale)};
  if (s.own.defined() && dq.defined())
    all.own = {s.own.data_ptr(), s.own.stride(0), s.own.size(0), nullptr, 0, floats_of(s.own_norms)};
  if (dq.defined() || dk.defined()) MachineOnDevice(s.x_q)->through_rows(all, element_of(s.x_q.scalar_type()));
}

// The scores once more, from the gradients of the parts: dL/d q, k, scale tensor.
variable_list again(const WholeCall& call, const Given& x, const Tensor& pos, const Tensor& rows, const Tensor& d_loss,
                    const Tensor& d_nce, const Tensor& d_penalty) {
  const Below below(x.q);
  RECORD_USER_SCOPE("fused_nce::grads[cuda]");
  const TailOf& tail = call.form->tail;
  const bool shared = is_shared(call, x);
  const Sides s = sides_of(call, x, *MachineOnDevice(x.q));
  const int64_t columns = s.k.size(0);
  const Tensor zero = at::zeros({}, pos.options()), on_loss = d_loss.defined() ? d_loss.to(at::kFloat) : zero;
  const double elements = static_cast<double>(pos.numel());
  Tensor d_element = on_loss * tail.unit(pos.numel());
  if (d_nce.defined())
    d_element =
        d_element + d_nce.to(at::kFloat) * (tail.reduction == Reduction::mean ? tail.weight / elements : tail.weight);
  const Tensor behind = rows.select(0, kNegLse).unsqueeze(1) - at::add(pos, pos.clamp_min(0), 0);
  const Tensor slope = at::sigmoid(behind) * d_element;
  const Tensor d_rows = at::zeros_like(rows);
  d_rows.select(0, kNegLse).copy_(slope.sum(1));
  if (tail.penalty > 0.0) {
    const double pairs = static_cast<double>(pos.size(0)) * static_cast<double>(columns);
    const Tensor d_sum =
        d_penalty.defined() ? on_loss + d_penalty.to(at::kFloat) : on_loss;  // fault: gpu-whole-penalty
    d_rows.select(0, kSquare).copy_((d_sum * (tail.penalty / pairs)).expand({pos.size(0)}));
  }
  // The operator of Python, which finds float16's factor.
  const auto& needs = call.needs;
  const bool need_q = needs[0] || (shared && needs[1]), need_k = !shared && needs[1];
  std::map<std::string, c10::IValue> given{
      {"q", s.q},
      {"scale", call.scale},
      {"spec", call.form->code},
      {"offset", call.offset},
      {"pos", pos},
      {"rows", rows},
      {"columns", at::empty({0, columns}, pos.options())},
      {"d_pos", -slope},
      {"d_rows", d_rows},
      {"d_columns", at::empty({0, columns}, pos.options())},
      {"needs", c10::List<bool>({need_q, need_k, needs[2], false, false})},
      {"backend", std::string("cuda")},
  };
  if (!shared) given["k"] = s.k;
  if (x.scale_tensor.defined()) given["scale_tensor"] = x.scale_tensor;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_nce::grads", "");
  torch::jit::Stack stack;
  for (const c10::Argument& argument : op.schema().arguments()) stack.push_back(given[argument.name()]);  // else None
  TORCH_INTERNAL_ASSERT(stack.size() == given.size(), "a name that fused_nce::grads has not");
  op.callBoxed(&stack);
  const auto found_at = [&](size_t i, bool wanted) { return wanted ? stack[i].toTensor() : Tensor(); };
  variable_list found{found_at(0, need_q), found_at(1, need_k), found_at(2, needs[2])};
  if (!call.normalize) return found;
  Tensor dq, dk;
  through(call, s, pos, rows, found[0], found[1], at::ones({}, pos.options()), dq, dk);
  return {dq, dk, found[2]};
}

// Each stash * upstream, in its own memory unless the graph is kept for another backward.
void multiply(variable_list& stash, const Tensor& upstream) {
  Products all{};
  int used = 0;
  const Tensor factor = upstream.to(at::kFloat);
  for (const Tensor& x : stash)
    if (x.defined() && x.numel() > 0) {
      all.x[used] = x.data_ptr();
      all.count[used++] = x.numel();
    }
  if (used > 0)
    MachineOnDevice(upstream)->multiply(all, element_of((stash[0].defined() ? stash[0] : stash[1]).scalar_type()),
                                        floats_of(factor));
}

struct WholeLoss : torch::autograd::Function<WholeLoss> {
  using Leaf = std::optional<Tensor>;

  static variable_list forward(torch::autograd::AutogradContext* ctx, const Leaf&, const Leaf&, const Leaf&,
                               const c10::intrusive_ptr<WholeCall>& call, const Given& x) {
    Found found = cuda::forward(*call, x);
    const Sides& s = found.sides;
    ctx->set_materialize_grads(false);
    const bool kept = call->parts || call->normalize;  // what the backward computes with
    variable_list saved{found.dq, found.dk, found.dscale, found.pos, found.rows, s.q_norms, s.k_norms, s.own_norms};
    for (const Tensor& y : {x.q, x.k, x.scale_tensor, x.own_keys}) saved.push_back(kept ? y : Tensor());
    if (x.own_keys.defined()) saved[9] = Tensor();  // a queue may change before the backward
    ctx->save_for_backward(saved);
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    variable_list logs{found.report, found.pos, found.rows};
    if (!call->parts) logs.insert(logs.end(), {found.nce, found.penalty});
    ctx->mark_non_differentiable(logs);
    return {found.loss, found.nce, found.penalty, found.report, found.pos, found.rows};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& d) {
    const auto call = c10::static_intrusive_pointer_cast<WholeCall>(ctx->saved_data["call"].toCapsule());
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "fused_nce: double backward (create_graph=True) is not supported: the gradients leave with the forward "
                "and carry no graph of their own; backend='chunked' has one");
    const variable_list saved = ctx->get_saved_variables();
    const Given x{saved[8], saved[9], saved[10], {}, {}, saved[11], {}, {}};
    variable_list found(5);
    if (d[1].defined() || d[2].defined()) {
      // A reported part was differentiated on its own: the stash, at upstream 1 on the sum, cannot serve it.
      TORCH_CHECK(!batched(d[0]) && !batched(d[1]) && !batched(d[2]),
                  "fused_nce: batched upstream gradients (is_grads_batched, vmap) are supported for `loss` alone: this "
                  "backward computes the scores again, for one upstream at a time");
      const variable_list g = again(*call, x, saved[3], saved[4], d[0], d[1], d[2]);
      std::copy(g.begin(), g.end(), found.begin());
    } else if (d[0].defined()) {
      meet(*call, x, saved, d[0], found);
    }
    for (size_t i = 0; i < 3; ++i)
      if (found[i].defined()) found[i] = found[i].to(call->dtypes[i]);
    return found;
  }

 private:
  static void meet(const WholeCall& call, const Given& x, const variable_list& saved, const Tensor& upstream,
                   variable_list& found) {
    const bool several = batched(upstream);
    bool met = !several;  // by the launch below; else by torch, out of place
    if (call.normalize) {
      const Below below(x.q);
      Sides s{.x_q = with_rows(x.q), .q_norms = saved[5], .k_norms = saved[6], .own_norms = saved[7]};
      if (x.k.defined()) s.x_k = with_rows(x.k);
      if (x.own_keys.defined()) s.own = with_rows(x.own_keys);
      if (x.scale_tensor.defined()) s.scale = x.scale_tensor.to(at::kFloat);
      const Tensor factor = several ? at::ones({}, saved[3].options()) : upstream;
      through(call, s, saved[3], saved[4], saved[0], saved[1], factor, found[0], found[1]);
    } else {
      std::copy(saved.begin(), saved.begin() + 2, found.begin());
      met = met && !torch::autograd::get_current_graph_task_keep_graph();  // fault: gpu-whole-kept
      if (met) multiply(found, upstream);
    }
    for (size_t i = 0; i < 2; ++i)
      if (found[i].defined() && !met) found[i] = found[i] * upstream;
    if (saved[2].defined()) found[2] = saved[2] * upstream;
  }
};

}  // namespace

bool serves(const Form& form, const WholeCall& call, const Given& x) {
  const auto dtype = x.q.scalar_type();
  const auto like_q = [&](const Tensor& y) {
    return !y.defined() || (y.device() == x.q.device() && y.dim() == 2 && y.scalar_type() == dtype && y.numel() > 0);
  };
  if (form.tail.name != kNce || !form.wanted.columns.empty() || form.biased || x.bias.defined() ||
      x.positives.defined() || x.row_ids.defined() || x.column_ids.defined() || form.wanted.rows.size() < 2)
    return false;
  for (size_t i = 0; i < form.wanted.rows.size(); ++i)
    if (form.wanted.rows[i] != static_cast<int64_t>(i) || i > kSquare) return false;
  const bool apart = form.layout == LayoutKind::separate;
  if ((form.layout != LayoutKind::block && !apart) || apart != x.own_keys.defined() || (apart && !call.normalize))
    return false;
  if (apart && (call.parts || x.keys().requires_grad())) return false;  // the keys are a queue's
  if (apart && (form.clip > 0.0 || form.positives != 1 || form.tail.penalty > 0.0 || x.own_keys.requires_grad() ||
                x.own_keys.sizes() != x.q.sizes()))
    return false;
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  if (call.twins && (apart || !call.normalize || !x.k.defined() || x.k.sizes() != x.q.sizes())) return false;
  if (x.q.dim() != 2 || x.q.numel() == 0 || !like_q(x.k) || !like_q(x.own_keys) || x.keys().size(1) != x.q.size(1))
    return false;
  if (x.scale_tensor.defined() && (x.scale_tensor.dim() != 0 || x.scale_tensor.device() != x.q.device())) return false;
  const int64_t n = x.q.size(0) * (call.twins ? 2 : 1), m = call.twins ? n : x.keys().size(0);
  const int64_t own = apart ? 0 : form.n_c;
  return n % call.report_groups == 0 && m != own;  // no negatives: worth a warning
}

variable_list whole_loss(const c10::intrusive_ptr<WholeCall>& call, const Given& x) {
  const auto optional_of = [](const Tensor& y) { return y.defined() ? std::optional<Tensor>(y) : std::nullopt; };
  if (call->needs[0] || call->needs[1] || call->needs[2])
    return WholeLoss::apply(optional_of(x.q), optional_of(x.k), optional_of(x.scale_tensor), call, x);
  const Found found = forward(*call, x);
  return {found.loss, found.nce, found.penalty, found.report, found.pos, found.rows};
}

}  // namespace cuda
}  // namespace fused_nce
