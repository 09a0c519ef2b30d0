"""The HTTP server: dialects over engines. It sees numpy arrays, never tensors."""
