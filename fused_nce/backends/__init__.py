"""Ways to run the engine's three ops. Each module implements `core.problem.Backend`; `core.dispatch` chooses."""
