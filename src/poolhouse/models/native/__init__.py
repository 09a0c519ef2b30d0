"""Models of our own: one packed Transformer, families of checkpoints, DeBERTa, tables of vectors."""
