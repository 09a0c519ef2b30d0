"""Words in, tokens out."""
