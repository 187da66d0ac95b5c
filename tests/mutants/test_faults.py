"""The faults still fit the code; `make mutants` looks first, too."""

import pytest

from tests.mutants.__main__ import ill_fitting, read


@pytest.mark.nightly
def test_every_fault_has_its_mark_and_every_mark_its_fault():
    faults = read()
    assert len(faults) > 150
    assert ill_fitting(faults) == []
