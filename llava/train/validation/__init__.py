"""Held-out records in the training loop: their loss, generated answers, and when to stop."""
