"""Results for people: dicts in, text and pages out. Nothing here computes an accuracy."""
