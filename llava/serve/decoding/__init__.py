"""Untrusted images, decoded in processes with limits of memory and time."""
