"""Pooling: hidden states in, answers out, by a pipeline of steps over rows."""
