"""Bench: this engine beside its peers, each side in its own process, and loads on running servers."""
