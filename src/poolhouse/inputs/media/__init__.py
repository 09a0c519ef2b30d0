"""Media: pictures from URLs, files and callers' objects, decoded and made ready for a model's tower."""
