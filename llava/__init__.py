"""LLaVA-Med: assistants that look at medical images and talk about them. For research only.

The public names stand in `__init__.pyi`. They are loaded on first use, so that `import llava` needs neither torch nor
time.
"""

import lazy_loader

from llava.library_logs import silence

__version__ = "2.0.0"

silence()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
