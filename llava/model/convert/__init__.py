"""Writing checkpoints in other forms: deltas, transformers' layout, quantized, merged, the projector alone."""
