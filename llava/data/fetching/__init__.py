"""Fetching images out of articles' archives: what to fetch, one archive, one transfer, the record of failures."""
