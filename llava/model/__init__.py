"""The multimodal model: tower, projector, language model, and every layout its checkpoints come in.

The public names stand in `__init__.pyi` and are loaded on first use: commands of this package answer --help without
torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
