"""Images of strangers, decoded in processes with limits of memory and time."""
