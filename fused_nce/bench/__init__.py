"""Measuring a loss on one's own machine: formulas as their users write them, rivals, clocks, peak memory."""
