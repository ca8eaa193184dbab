"""The package nixl under the name of a CUDA 13 build: one build serves every CUDA version."""
import sys as _sys

import nixl as _nixl
import nixl._api
import nixl._bindings
import nixl._utils
import nixl.logging
from nixl import *  # noqa: F401,F403

for _name in ("_api", "_bindings", "_utils", "logging"):
    _sys.modules[__name__ + "." + _name] = _sys.modules["nixl." + _name]
    globals()[_name] = _sys.modules["nixl." + _name]


def __getattr__(name):
    return getattr(_nixl, name)
