"""vLLM's own routes."""
