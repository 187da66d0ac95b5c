"""Checkpoints, whole or in parts, what a run that goes on is told of them, and the folder's lock."""
