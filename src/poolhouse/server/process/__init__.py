"""Process: our own server around the application, from its sockets to its stop."""
