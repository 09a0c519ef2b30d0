"""The documents hold: their examples run, their maps are true."""
