"""The losses on one GPU against the rivals that people use: `python -m bench.gpu`, or all of it by `bash bench/gpu.sh`."""
