"""Training: flags, data, Trainer, checkpoints."""
