"""Writing instruct data with a language model that sees captions only."""
