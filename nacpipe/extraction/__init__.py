"""Stage 1: run a network over a benchmark's images once, and write activations and gradients to a cache."""
