# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 for Tunix: text and images, from a Hugging Face directory to an adapter and back.

Names are loaded when first used, so that importing the package costs nothing and changes nothing;
`__init__.pyi` says where they are from.
"""

from pathlib import Path

import lazy_loader

# Former names of modules are found behind those of today.
__path__.append(str(Path(__file__).parent / "_renamed"))

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
