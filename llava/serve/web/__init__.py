"""The web page: its parts, its conversation, and what it asks of the workers. Loads no model."""
