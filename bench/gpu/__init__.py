"""The losses on one GPU against the rivals that people use: `python -m bench.gpu`, within `bash bench/gpu.sh`."""
