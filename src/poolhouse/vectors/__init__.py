"""Numpy on answers: scores, smaller numbers, fewer vectors, files of them, entities."""
