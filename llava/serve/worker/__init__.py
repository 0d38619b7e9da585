"""A worker: requests from HTTP to an engine or another server, and its registration with the controller."""
