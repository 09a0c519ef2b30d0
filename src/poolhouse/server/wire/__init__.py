"""Wire: what every dialect reads and writes; bodies, arrays, errors, and the paths of probes."""
