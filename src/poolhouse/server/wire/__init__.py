"""What every dialect reads and writes: bodies, arrays, errors, contracts."""
