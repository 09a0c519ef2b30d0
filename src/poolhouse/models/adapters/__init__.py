"""Low-rank adapters: their files, the weights that they change, one per request."""
