"""Questions to answer files: from a checkpoint here or from a server, resumable, with a manifest."""
