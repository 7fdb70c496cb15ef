"""Which images a benchmark is made of, and where they are: no torch, nothing is decoded."""
