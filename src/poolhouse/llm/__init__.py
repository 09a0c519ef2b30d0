"""Pooling models from Python."""

from poolhouse.llm.llm import LLM

__all__ = ["LLM"]
