"""Version: the number of this release, which stands nowhere else."""

VERSION = "0.1.0"
