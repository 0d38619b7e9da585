"""LLaVA's name of llava.model.projector."""
