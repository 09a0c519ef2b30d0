"""`python -m poolhouse.cli`: the command line, as the script `poolhouse` runs it."""

from poolhouse.cli import main

main()
