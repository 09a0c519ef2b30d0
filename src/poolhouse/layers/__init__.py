"""Tensors in, tensors out; nothing here knows a model."""
