"""Other installed distributions that own files of our names."""
import os
import sys

_OWNERS = ("nixl", "nixl_cu12", "nixl_cu13", "nixl_ep", "nixl_ep_cu12", "nixl_ep_cu13")


def others(path=None):
    """Their names. Looks at the names of files only, so that an import costs nothing for it; `nixl` itself counts when it is an
    installation older than ours or one from which this module does not come."""
    here = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
    found = []
    for folder in dict.fromkeys(os.path.realpath(entry or ".") for entry in (sys.path if path is None else path)):
        try:
            entries = os.listdir(folder)
        except OSError:
            continue
        for entry in entries:
            name, _, rest = entry.partition("-")
            name = name.lower().replace(".", "_")
            if name not in _OWNERS or not rest.endswith((".dist-info", ".egg-info")):
                continue
            if name == "nixl" and (folder == here or _is_ours(os.path.join(folder, entry))):
                continue
            found.append(name.replace("_", "-"))
    return sorted(set(found))


def _is_ours(info):
    """Does the installation hold our own native module?"""
    try:
        with open(os.path.join(info, "RECORD")) as record:
            return any(line.startswith("nixl/_installed.py,") for line in record)
    except OSError:
        return False
