"""The demo: small models through the whole road, from pictures drawn by the program to a page of scores."""
