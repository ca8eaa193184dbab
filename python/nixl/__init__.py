"""nixl: moves registered memory, files and objects between processes through plug-in backends.

Importing loads neither torch nor a CUDA driver and changes no global state.
"""
from . import _bindings, _utils, logging
from ._bindings import *  # noqa: F401,F403
from ._utils import *  # noqa: F401,F403
from .logging import *  # noqa: F401,F403
from . import _api
from ._api import *  # noqa: F401,F403
from ._installed import others as _others
from ._native import version as _version

__version__ = _version()
for _name in _others():
    _api.logger.warning("the installed distribution %s owns files of the same names as nixl; pip uninstall %s, then install nixl again",
                        _name, _name)
    del _name


def __getattr__(name):
    if name == "np":
        return _api.np
    raise AttributeError(f"module 'nixl' has no attribute {name!r}")
