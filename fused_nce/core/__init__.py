"""The engine: what a score goes through, the three ops that carry it, and the choice of a backend. Knows no loss."""
