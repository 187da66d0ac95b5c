"""Inputs: files to batches of views. Takes plain settings and numbers, and knows no method."""
