"""GPU evidence in one command: probes, kernels, our engine under ceilings, and the rivals beside it."""
