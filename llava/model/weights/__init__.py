"""Files of weights: read and written tensor by tensor, checked, placed on devices, never executed."""
