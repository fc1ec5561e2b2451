"""A tracker as MAE-Lite trains one for LaSOT: OSTrack-256 with elimination, 300 epochs of 60,000 pairs, batch 128."""

_base_ = "./_track.py"
