"""Bad input: one line that names the argument, the value seen and the value needed, before any work."""

from __future__ import annotations

import math

import pytest
import torch

from fused_nce import AMDIMLoss, amdim_nce, tile_loss, tile_stats
from fused_nce.core import dispatch
from fused_nce.core.spec import Block, Spec, TanhClip, parse
from fused_nce.core.tails import Nce
from tests.refusals import unlike

A, C = torch.ones(4, 8), torch.ones(4, 3, 8)
Q, K = torch.ones(4, 8), torch.ones(12, 8)
SPEC = Spec(Block(3), TanhClip(20.0))
VIEW = {"f1": torch.ones(4, 8), "f5": torch.ones(4, 8, 5, 5)}
META = torch.ones(4, 3, 8, device="meta")


def nce(a=A, c=C, **options):
    return lambda: amdim_nce(a, c, **options)


def loss(q=Q, k=K, spec=SPEC, tail=None, **options):
    return lambda: tile_loss(q, k, spec, tail or Nce(), **options)


def stats(q=Q, k=K, spec=SPEC, **options):
    return lambda: tile_stats(q, k, spec, **options)


CASES = [
    # amdim_nce: type and shape of the features
    (nce(a=A.tolist()), TypeError, r"^antecedents: got list, need a \(n_a, D\) tensor$"),
    (nce(c=None), TypeError, r"^consequents: got NoneType, need a \(n_k, n_c, D\) tensor$"),
    (nce(a=A[0]), ValueError, r"^antecedents: got shape \(8,\), need \(n_a, D\)$"),
    (nce(a=A[None, None]), ValueError, r"^antecedents: got shape \(1, 1, 4, 8\), need \(n_a, D\)$"),
    (nce(c=C.view(12, 8)), ValueError, r"^consequents: got shape \(12, 8\), need \(n_k, n_c, D\)$"),
    (nce(a=A[:0]), ValueError, r"^antecedents: got shape \(0, 8\), need \(n_a, D\) with n_a >= 1$"),
    (nce(a=A[:, :0], c=C[..., :0]), ValueError, r"^antecedents: got shape \(4, 0\), need \(n_a, D\) with D >= 1$"),
    (nce(c=C[:, :0]), ValueError, r"^consequents: got shape \(4, 0, 8\), need \(n_k, n_c, D\) with n_c >= 1$"),
    (nce(a=A[:, None].expand(4, 2, 8)[:, :0]), ValueError, r"^antecedents: got shape \(4, 0, 8\), .* with n_r >= 1$"),
    (nce(c=C[..., :7]), ValueError, r"^consequents: got width D = 7, need antecedents's 8$"),
    (nce(c=C[:3]), ValueError, r"^consequents: got n_k = 3 images for n_a = 4 antecedents at offset 0, need .*$"),
    # dtypes, layouts, devices
    (nce(a=A.int()), TypeError, r"^antecedents: got torch.int32, need float64, float32, bfloat16 or float16$"),
    (nce(c=C.to(torch.complex64)), TypeError, r"^consequents: got torch.complex64, need float64, .*$"),
    (nce(a=A.bool()), TypeError, r"^antecedents: got torch.bool, need float64, .*$"),
    (nce(a=A.to(torch.float8_e4m3fn)), TypeError, r"^antecedents: got torch.float8_e4m3fn, need float64, .*$"),
    (
        nce(c=C.bfloat16()),
        TypeError,
        r"^consequents: got torch.bfloat16, need antecedents's torch.float32 .*autocast.*$",
    ),
    (nce(a=A.to_sparse()), TypeError, r"^antecedents: got layout torch.sparse_coo .*, need a dense \(n_a, D\) tensor$"),
    (nce(c=META), ValueError, r"^consequents: got device meta, need antecedents's cpu$"),
    # settings
    (nce(offset=1), ValueError, r"^consequents: got n_k = 4 images for n_a = 4 antecedents at offset 1, need .*$"),
    (nce(offset=-1), ValueError, r"^consequents: got .* at offset -1, need 0 <= offset and n_k >= offset \+ n_a$"),
    (nce(offset=1.0), TypeError, r"^offset: got float, need an int$"),
    (nce(offset=True), TypeError, r"^offset: got bool, need an int$"),
    (nce(clip=0), ValueError, r"^clip: got 0, need a finite number > 0$"),
    (nce(clip=-20.0), ValueError, r"^clip: got -20.0, need a finite number > 0$"),
    (nce(clip=math.nan), ValueError, r"^clip: got nan, need a finite number > 0$"),
    (nce(clip=math.inf), ValueError, r"^clip: got inf, need a finite number > 0$"),
    (nce(clip="20"), TypeError, r"^clip: got str, need a number \(int, float or NumPy's\)$"),
    (nce(penalty=-0.1), ValueError, r"^penalty: got -0.1, need a finite number >= 0$"),
    (nce(penalty=math.nan), ValueError, r"^penalty: got nan, need a finite number >= 0$"),
    (nce(penalty=None), TypeError, r"^penalty: got NoneType, need a number .*$"),
    (nce(scale=math.inf), ValueError, r"^scale: got inf, need a finite number > 0$"),
    (nce(scale=math.nan), ValueError, r"^scale: got nan, need a finite number > 0$"),
    (nce(scale="1"), TypeError, r"^scale: got str, need a number \(int, float or NumPy's\) or a 0-d tensor$"),
    (nce(scale=torch.ones(1)), ValueError, r"^scale: got a torch.float32 tensor of shape \(1,\), need a 0-d float .*$"),
    (nce(scale=torch.tensor(1)), ValueError, r"^scale: got a torch.int64 tensor of shape \(\), need a 0-d float .*$"),
    (nce(scale=torch.ones((), device="meta")), ValueError, r"^scale: got device meta, need the inputs' cpu$"),
    (nce(reduction="avg"), ValueError, r"^reduction: got 'avg', need one of 'mean', 'sum', 'none'$"),
    (nce(backend="cudnn"), ValueError, r"^backend: got 'cudnn', need one of .*'chunked'.*$"),
    (nce(a=A.double(), c=C.double(), backend="cpu"), ValueError, r"^backend: got 'cpu', which cannot run this: .*$"),
    # the engine's own entries
    (loss(q=[1.0]), TypeError, r"^q: got list, need a \(N, D\) tensor$"),
    (loss(q=C), ValueError, r"^q: got shape \(4, 3, 8\), need \(N, D\)$"),
    (loss(k=K[:11]), ValueError, r"^k: got M = 11, need a multiple of n_c = 3$"),
    (loss(k=K[:9]), ValueError, r"^offset: got 0 with 4 images of rows, need 0 <= offset <= -1$"),
    (loss(offset=1), ValueError, r"^offset: got 1 with 4 images of rows, need 0 <= offset <= 0$"),
    (loss(offset=-1), ValueError, r"^offset: got -1 with 4 images of rows, need 0 <= offset <= 0$"),
    (loss(spec=Spec(Block(3, 3))), ValueError, r"^q: got N = 4, need a multiple of rows_per_image = 3$"),
    (loss(spec=Spec(Block(3, 0))), ValueError, r"^q: got N = 4, need a multiple of rows_per_image = 0$"),
    (loss(spec=Spec(Block(0))), ValueError, r"^k: got M = 12, need a multiple of n_c = 0$"),
    (loss(spec=Spec(Block(3), TanhClip(0.0))), ValueError, r"^clip: got 0.0, need a finite number > 0$"),
    (loss(spec=Spec(Block(3), stats=("neg_lse",))), ValueError, r"^spec: got statistics \('neg_lse',\), need all .*$"),
    (loss(report_groups=3), ValueError, r"^report_groups: got 3 for N = 4 rows, need a divisor of them$"),
    (loss(report_groups=True), TypeError, r"^report_groups: got .*$"),
    (stats(k=K.half()), TypeError, r"^k: got torch.float16, need q's torch.float32 .*$"),
    (stats(k=K[:, :5]), ValueError, r"^k: got width D = 5, need q's 8$"),
    (stats(scale=math.nan), ValueError, r"^scale: got nan, need a finite number$"),
    # AMDIMLoss
    (lambda: AMDIMLoss(pairs="1>5"), ValueError, r"^pairs: got '1>5', need a non-empty sequence such as .*$"),
    (lambda: AMDIMLoss(pairs=()), ValueError, r"^pairs: got \(\), need a non-empty sequence such as .*$"),
    (lambda: AMDIMLoss(pairs=("1-5",)), ValueError, r"^pairs: got '1-5', need 'A>C' with the sizes of two maps.*$"),
    (lambda: AMDIMLoss(antecedents="one"), ValueError, r"^antecedents: got 'one', need one of 'sample', 'all'$"),
    (lambda: AMDIMLoss(preset="small"), ValueError, r"^preset: got 'small', need one of None, 'paper', 'amdim-.*'$"),
    (lambda: AMDIMLoss()(VIEW, VIEW), ValueError, r"^view: got maps \['f1', 'f5'\], need 'f7' for the pairs .*$"),
    (
        lambda: AMDIMLoss(("1>5",))({**VIEW, "f5": A[None]}, VIEW),
        ValueError,
        r"^f5: got shape \(1, 4, 8\), need \(B, D, H, W\)$",
    ),
    # codes and names
    (lambda: parse("block(3,1) relu() neg_lse"), ValueError, r"^spec: got 'block\(3,1\) relu\(\) neg_lse', need .*$"),
    (lambda: parse("block(3,1) identity() median"), ValueError, r"^spec: got .*median', need .*$"),
    (lambda: dispatch.backend_module("mps"), ValueError, r"^backend: got 'mps', need one of .*$"),
]
assert len(CASES) >= 30


def test_what_is_not_refused_is_told():
    assert unlike([(int, ValueError, "x"), (lambda: int("y"), ValueError, "^y")]) == [
        "0: returned 0, need ValueError: x",
        "1: invalid literal for int() with base 10: 'y', need ValueError: ^y",
    ]


def test_messages():
    assert unlike(CASES) == []


def test_nothing_runs_before_the_checks(monkeypatch):
    """A bad setting is found before a backend is even chosen; a missing map when its pair's turn comes."""
    monkeypatch.setattr("fused_nce.core.dispatch.choose", lambda *_: pytest.fail("work began"))
    assert unlike([case for case in CASES if not case[2].startswith(("^backend", "^view", "^f5"))]) == []


def test_workspace_variable(monkeypatch):
    for text in ("0", "-1", "much", "nan"):
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", text)
        with pytest.raises(ValueError, match=rf"^FUSED_NCE_WORKSPACE_MB: got '{text}', need a positive number of MiB$"):
            amdim_nce(A, C, backend="chunked")


def test_a_distributed_tensor_is_named():
    class DTensor(torch.Tensor):
        pass

    x = torch.ones(4, 8).as_subclass(DTensor)
    with pytest.raises(TypeError, match=r"^antecedents: got a DTensor, need a local .*to_local.*"):
        amdim_nce(x, C)
