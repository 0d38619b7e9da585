"""What every server shares below its routes: connections, hosts, bodies, errors, and the client between servers."""
