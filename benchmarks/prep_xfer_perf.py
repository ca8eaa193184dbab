#!/usr/bin/env python3
"""What a request of a million blocks costs, out of two prepared sides, by indices from a list or an array.

  prep_xfer_perf.py [list|array]      default: both

The must is the documented target, for arrays; times are the least of five."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

import numpy  # noqa: E402

from desc_perf import COUNT, PIECE, least_ms, rows  # noqa: E402
from utils.figures import Figure, parse_arguments, report  # noqa: E402


def main():
    arguments = parse_arguments(__doc__, lambda parser: parser.add_argument(
        "kind", nargs="?", choices=("list", "array", "both"), default="both"))
    import nixl

    agent = nixl.nixl_agent("prep_xfer_perf", nixl.nixl_agent_config(backends=["UCX"]))
    memory = numpy.zeros(2 * COUNT * PIECE, dtype=numpy.uint8)
    registered = agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    near, far = rows(memory.ctypes.data), rows(memory.ctypes.data + COUNT * PIECE)
    prepare = least_ms(lambda: agent.prep_xfer_dlist("", near, "DRAM"))
    sides = agent.prep_xfer_dlist("", near, "DRAM"), agent.prep_xfer_dlist(agent.name, far, "DRAM")
    order = numpy.arange(COUNT, dtype=numpy.int32)
    scattered = numpy.random.default_rng(1).permutation(COUNT).astype(numpy.int32)
    figures = [Figure("prep_xfer_dlist, array of 10^6 rows", prepare, "ms")]
    for what, must, near_order in (("in order", 44, order), ("scattered", None, scattered)):
        for kind in ("array", "list"):
            if arguments.kind not in (kind, "both"):
                continue
            a, b = (near_order, order) if kind == "array" else (near_order.tolist(), order.tolist())
            took = least_ms(lambda a=a, b=b: agent.make_prepped_xfer("WRITE", sides[0], a, sides[1], b, skip_desc_merge=True))
            figures.append(Figure(f"make_prepped_xfer, {kind} of 10^6 indices {what}", took, "ms", must if kind == "array" else None))
    for side in sides:
        side.release()
    agent.deregister_memory(registered)
    return report("Requests of a million blocks", figures, __doc__.split("\n\n")[2], arguments)


if __name__ == "__main__":
    sys.exit(main())
