"""Data sets: converters, download, validation, audit, statistics, and the built-in set."""
