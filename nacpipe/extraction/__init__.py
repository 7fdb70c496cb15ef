"""Stage 1: run a network over a benchmark's images once, and write its states to a cache."""
