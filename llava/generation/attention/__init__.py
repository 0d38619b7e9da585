"""Attention over keys and values in pages, and a decoder layer in few operations: what a GPU answers with."""
