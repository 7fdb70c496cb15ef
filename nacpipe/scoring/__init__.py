"""From a cache's states to scores, on the CPU and without torch."""
