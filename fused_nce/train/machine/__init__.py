"""The machine that a run is on: precision and memory, threads, SLURM, signals."""
