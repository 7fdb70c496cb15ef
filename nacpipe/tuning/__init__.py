"""Stage 2: search the parameters with Optuna against a cache. The only package that imports optuna."""
