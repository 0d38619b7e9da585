"""The demo: small models through the full pipeline, from images drawn by the program to a page of scores."""
