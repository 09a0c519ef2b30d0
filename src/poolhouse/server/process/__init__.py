"""The process around the application: starting, sockets, connections, stopping."""
