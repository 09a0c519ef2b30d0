"""Templates of prompts: rendered within bounds, of pairs and of messages."""
