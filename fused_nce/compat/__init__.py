"""The names, signatures and results of the projects that users come from, on the fused losses. One file a project.

An option that a fused loss cannot honour raises, and says which; nothing falls back to another formula.
"""
