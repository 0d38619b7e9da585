"""What happens in a training step: precision, attention over packs, gradients, the loss's finiteness."""
