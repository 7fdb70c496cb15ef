"""Networks: building them, loading their weights, and reading layers with hooks. Needs torch."""
