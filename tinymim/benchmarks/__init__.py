"""Measured comparisons of whole models: what tools/ scripts of the same options run. Results lie in docs/."""
