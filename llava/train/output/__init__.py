"""What a run leaves in its folder: checkpoints, the projector, its flags, its summary."""
