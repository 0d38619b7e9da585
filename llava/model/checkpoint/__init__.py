"""The layouts that checkpoints come in, each as one list of tensors under LLaVA's names."""
