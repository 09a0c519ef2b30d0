"""Files of a checkpoint: what they say, each JSON file read once."""
