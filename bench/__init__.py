"""Time and peak memory of the losses against the rivals that people use: `python -m bench`, `pytest bench`."""
