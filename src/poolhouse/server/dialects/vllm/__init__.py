"""vLLM: its own routes, a file for each kind of answer."""
