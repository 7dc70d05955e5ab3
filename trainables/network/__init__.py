"""The network: geometry, heads, released weights, BatchNorm, kernels and averaged weights."""
