"""Towers: native vision towers, one file for each kind; they make rows of the pictures of a pack."""
