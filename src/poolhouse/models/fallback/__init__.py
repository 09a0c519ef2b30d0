"""Models that transformers builds, packed where that is right."""
