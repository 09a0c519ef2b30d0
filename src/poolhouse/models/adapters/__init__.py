"""Low-rank adapters: their files, their place in a model, one per request."""
