"""nixl: moves registered memory, files and objects between processes through plug-in backends.

Importing loads neither torch nor a CUDA driver and changes no global state.
"""
from . import _bindings, _utils, logging
from ._bindings import *  # noqa: F401,F403
from ._utils import *  # noqa: F401,F403
from .logging import *  # noqa: F401,F403
from . import _api
from ._api import *  # noqa: F401,F403
from ._native import version as _version

__version__ = _version()


def __getattr__(name):
    if name == "np":
        return _api.np
    raise AttributeError(f"module 'nixl' has no attribute {name!r}")
