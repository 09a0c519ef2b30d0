"""Version: the number of this release, which stands nowhere else."""

__version__ = "0.1.0"
