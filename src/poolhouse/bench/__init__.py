"""Bench: this engine beside a reference library, and loads on running servers."""
