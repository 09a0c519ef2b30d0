"""Vectors: what is computed of answers with numpy: scores, smaller numbers, fewer vectors, files, entities."""
