"""Checkpoints in, models out."""
