"""Losses of several processes: real ones, over gloo."""
