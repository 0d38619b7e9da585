"""LLaVA-Med: assistants that look at medical images and talk about them. For research only.

The public names stand in `__init__.pyi`. They are loaded on first use, so that `import llava` needs neither torch nor
time.
"""

import lazy_loader

__version__ = "2.0.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
