"""Faults in the adapters and in `patch`, each with the test file that must notice it."""

from __future__ import annotations

from tests.mutants.faults import Fault

COMPAT = "fused_nce/compat"
PROCESSES = "tests/compat/test_processes.py"


def fault(reason: str, file: str, find: str, replace: str, *tests: str) -> Fault:
    return Fault(reason, file, find, replace, tests)


ADAPTERS = (
    fault(
        "moco: the queue as it is after this batch",
        f"{COMPAT}/moco.py",
        "negatives = self.queue.t().clone(memory_format=torch.contiguous_format)",
        "negatives = self.queue.t()",
        "tests/compat/test_moco.py",
    ),
    fault(
        "moco: a search for the largest that forgets earlier panels",
        f"{COMPAT}/moco.py",
        "torch.cat((best, scores), dim=1).topk(min(k, best.shape[1] + scores.shape[1]), dim=1)",
        "torch.cat((best, scores), dim=1)[:, -scores.shape[1] - 1 :].topk(min(k, 1 + scores.shape[1]), dim=1)",
        "tests/compat/test_moco.py",
    ),
    fault(
        "moco: keys do not return to their images",
        f"{COMPAT}/moco.py",
        "order[self._mine(x)]], order.argsort()",
        "order[self._mine(x)]], order",
        "tests/compat/test_moco.py",
    ),
    fault(
        "lightly: the bank moves where nothing is learned",
        f"{COMPAT}/lightly.py",
        "if z0.requires_grad:",
        "if out0.requires_grad:",
        "tests/compat/test_use.py",
    ),
    fault(
        "pml: the same labels on both sides leave a row its own positive",
        f"{COMPAT}/pml/base.py",
        "(ref_labels is labels and labels.device == embeddings.device)",
        "False",
        "tests/compat/test_use.py",
    ),
    fault(
        "pml: a distance that is set afterwards is not heard",
        f"{COMPAT}/pml/base.py",
        'return f"distance={type(seen).__name__}"',
        "return None",
        "tests/compat/test_use.py",
    ),
    fault(
        "moco: what is written into the logits is forgotten",
        f"{COMPAT}/moco.py",
        "            self._written = full\n        return getattr",
        "            pass\n        return getattr",
        "tests/compat/test_use.py",
    ),
    fault(
        "a subclass's hook is ignored",
        f"{COMPAT}/base.py",
        "cls.refuse(cls, name)",
        "pass",
        "tests/compat/test_use.py",
    ),
    fault(
        "CPCTask: every step counts once",
        f"{COMPAT}/bolts.py",
        "Nce(weight=float(i))",
        "Nce()",
        "tests/compat/test_tasks.py",
    ),
    fault(
        "decoupled loss: weights view by view",
        f"{COMPAT}/lightly.py",
        "torch.stack(weights, dim=1).flatten()",
        "torch.cat(weights)",
        "tests/compat/test_tasks.py",
    ),
    fault(
        "DIM: one pair of its own image at −10, not L",
        f"{COMPAT}/dim.py",
        "MASKED + math.log(local.shape[1])",
        "MASKED",
        "tests/compat/test_functions.py",
    ),
    fault(
        "solo-learn: the positives' mean for their sum",
        f"{COMPAT}/solo.py",
        'found.loss - fixed_mean(found.rows["pos_count"].clamp(min=1).log())',
        "found.loss",
        "tests/compat/test_functions.py",
    ),
    fault(
        "pml: a row is its own positive in the memory",
        f"{COMPAT}/pml/base.py",
        "c[:, None, :] != itself[:, :, None]",
        "c[:, None, :] != itself[:, :, None] - c.numel()",
        "tests/compat/test_pml.py",
    ),
    fault(
        "pml: a memory that turns is compared at the wrong place",
        f"{COMPAT}/pml/wrappers.py",
        "k.roll(-first, 0)",
        "k.roll(first, 0)",
        "tests/compat/test_pml.py",
    ),
    fault(
        "pml: a NaN is no loss above 0",
        f"{COMPAT}/pml/base.py",
        "~(losses <= 0)",
        "losses > 0",
        "tests/compat/test_pml.py",
    ),
    fault(
        "supcontrast: a mask's row is its own positive",
        f"{COMPAT}/supcontrast.py",
        "- itself * q",
        "- 0 * q",
        "tests/compat/test_formulas.py",
    ),
    fault(
        "processes: ClipLoss has the exact gradient where upstream's is 1/W of it",
        f"{COMPAT}/open_clip.py",
        "share = 1 if exact else 1 / self.world_size",
        "share = 1",
        PROCESSES,
    ),
    fault(
        "processes: ClipLoss with local_loss alone has the terms of all processes",
        f"{COMPAT}/open_clip.py",
        "if self.local_loss and not exact:",
        "if not exact and False:",
        PROCESSES,
    ),
    fault(
        "processes: ClipLoss reports a part for the whole",
        f"{COMPAT}/open_clip.py",
        "return loss if self.local_loss else mean_of_all(loss)",
        "return loss",
        PROCESSES,
    ),
    fault(
        "processes: the scale of Inf-CL has its own gradient",
        f"{COMPAT}/inf_cl.py",
        "gradient_times(factor, world_size())",
        "gradient_times(factor, 1)",
        PROCESSES,
    ),
    fault(
        "processes: lightly's bank takes in the rows of one process",
        f"{COMPAT}/lightly.py",
        "gathered(z1) if self.gather_distributed else z1.detach()",
        "z1.detach()",
        PROCESSES,
    ),
    fault(
        "processes: the decoupled loss stays at home",
        f"{COMPAT}/lightly.py",
        "found = tile_stats(z, None, TWINS, scale=inverse(self.temperature, z), group=group)",
        "found = tile_stats(z, None, TWINS, scale=inverse(self.temperature, z))",
        PROCESSES,
    ),
    fault(
        "processes: pml's rows of all by rank, not its own first",
        f"{COMPAT}/pml/wrappers.py",
        "torch.cat([x, *(part for i, part in enumerate(parts) if i != rank())])",
        "torch.cat([x if i == rank() else part for i, part in enumerate(parts)])",
        PROCESSES,
    ),
    fault(
        "processes: pml's wrapper loses the others' share of an exact gradient",
        f"{COMPAT}/pml/wrappers.py",
        "embeddings = gradient_times(embeddings, size)",
        "embeddings = gradient_times(embeddings, 1)",
        PROCESSES,
    ),
    fault(
        "patch: the difference is looked at by nobody",
        "fused_nce/patch.py",
        "check_within(differences, self.within)",
        "check_within(differences, None)",
        "tests/test_patch.py",
    ),
    fault(
        "patch: upstream's own memory moves with the copies'",
        "fused_nce/patch.py",
        "both = of_leaves(self.theirs, where), of_leaves(ours, where)",
        "both = of_leaves(self.theirs.forward, where), of_leaves(ours, where)",
        "tests/test_patch.py",
    ),
    fault(
        "verify: float32's roundings under autocast",
        "fused_nce/verify.py",
        "if cast else eps",
        "if cast and False else eps",
        "tests/test_patch.py",
    ),
)
