"""Studies: data only, a table of the paper each; ``_small``: on photos of a few pixels, in minutes a cell."""
