"""The faults still fit the code: a drifted one would plant nothing."""

from __future__ import annotations

import pytest

from tests.mutants.__main__ import ROOT
from tests.mutants.adapters import ADAPTERS
from tests.mutants.family import FAMILY
from tests.mutants.faults import CPP, PYTHON
from tests.mutants.gpu import GPU
from tests.mutants.trainer import TRAINER
from tests.mutants.triton import TRITON

FAULTS = (*PYTHON, *FAMILY, *CPP, *GPU, *TRITON, *TRAINER, *ADAPTERS)


def test_there_are_enough():
    assert len(FAULTS) >= 21
    assert len({fault.reason for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.reason)
def test_fits(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.find) == 1
    assert fault.find != fault.replace
    assert all((ROOT / name.partition("::")[0]).is_file() for name in fault.tests)
