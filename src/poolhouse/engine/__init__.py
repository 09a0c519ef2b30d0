"""The engine: requests in, futures out; one device thread runs packed batches."""
