"""What several requests make together: their requests, and the result made of their answers."""
