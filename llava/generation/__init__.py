"""The engine that turns (conversation, images, sampling) into text: batched, streaming, continuous.

The public names stand in `__init__.pyi` and are loaded on first use: commands that read errors and requests alone don't
load torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
