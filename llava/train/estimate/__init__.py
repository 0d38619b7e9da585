"""The dry run: the real training code on tensors without content, to say what a recipe needs before it is started."""
