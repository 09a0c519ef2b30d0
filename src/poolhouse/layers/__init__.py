"""Layers: tensors in, tensors out; no layer knows a model."""
