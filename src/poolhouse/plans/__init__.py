"""Plans: the requests that one result needs, and how their answers become it."""
