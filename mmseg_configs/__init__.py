"""MMSegmentation configs, data only: one file per experiment, shared parts in ``_base_``."""
