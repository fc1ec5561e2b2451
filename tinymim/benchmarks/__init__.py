"""Measured comparisons of whole models, which the scripts in tools/ run. Results are in docs/."""
