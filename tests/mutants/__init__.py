"""Planted faults. `python -m tests.mutants` plants each in a copy of the project; the suite must turn red."""
