"""Judging frozen features: features in, dicts of numbers out. Nothing here writes a file."""
