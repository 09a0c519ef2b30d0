"""What lies end to end: the tokens of a prompt, the segments of a pack, a batch."""
