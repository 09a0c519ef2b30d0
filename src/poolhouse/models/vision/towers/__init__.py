"""Towers: native vision Transformers that make rows of pictures, one file per kin."""
