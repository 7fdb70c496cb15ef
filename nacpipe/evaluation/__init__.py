"""How well scores tell ID from OOD: tables, baselines, intervals, inspection. No torch."""
