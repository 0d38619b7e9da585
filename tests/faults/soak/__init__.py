"""An hour of ordinary and odd clients beside faults: what is lost, what grows. `__main__` is the command."""
