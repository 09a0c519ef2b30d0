"""Inputs: prompts in, tokens out."""
