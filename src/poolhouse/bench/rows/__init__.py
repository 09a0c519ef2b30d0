"""Rows of `poolhouse bench`: one file per command, each a function that makes a report."""
