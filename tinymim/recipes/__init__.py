"""Recipes: data only, one file an experiment, ``<method>_<student>_from_<teacher>.py``."""
