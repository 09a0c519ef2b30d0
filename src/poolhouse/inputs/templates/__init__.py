"""Templates: Jinja in a sandbox, score templates of pairs, and the built-in .jinja files."""
