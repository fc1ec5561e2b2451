"""MMSegmentation configs, data only: one file an experiment, what they share in ``_base_``."""
