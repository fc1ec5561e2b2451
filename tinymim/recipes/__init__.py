"""Recipes: data only, one file per experiment, ``<method>_<student>_from_<teacher>.py``."""
