"""Faults in the adapters and in `patch`, each with the test file that must notice it."""

from __future__ import annotations

from tests.mutants.faults import Fault

COMPAT = "fused_nce/compat"


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
        "return _gathered(keys)[order.argsort()[mine]]",
        "return _gathered(keys)[order[mine]]",
        "tests/compat/test_moco.py",
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
        "x.roll(-first, 0)",
        "x.roll(first, 0)",
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
        "patch: the difference is looked at by nobody",
        "fused_nce/patch.py",
        "check_within(differences, self.within)",
        "check_within(differences, None)",
        "tests/test_patch.py",
    ),
    fault(
        "patch: upstream's own memory moves with the copies'",
        "fused_nce/patch.py",
        "compare(_Call(self.theirs, n_args, names), ours,",
        "compare(_Call(self.theirs, n_args, names).forward, ours,",
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
