"""LLaVA's name of the package of vision towers (llava.model.towers)."""
