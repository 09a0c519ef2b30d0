"""`python -m poolhouse.cli`."""

from poolhouse.cli import main

main()
