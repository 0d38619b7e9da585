"""The demo: small models through the whole road, from images drawn by the program to a page of scores."""
