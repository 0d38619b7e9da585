"""What a dry run is of: models known by name, shapes without weights, lengths of the data."""
