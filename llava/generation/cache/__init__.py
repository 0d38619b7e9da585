"""Keys and values of the running requests, and of prompts that were computed before."""
