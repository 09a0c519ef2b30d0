"""The pages about vector stores and frameworks run, with their clients; `make test-stores` makes their environment."""
