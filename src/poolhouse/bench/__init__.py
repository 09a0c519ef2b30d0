"""`poolhouse bench`: this engine against a reference library, each side in its own process, and loads on running servers."""
