#!/usr/bin/env python3
"""What a million descriptors cost: built from a list of tuples, from an array, and as one strided row.

The musts are the documented targets; times are the least of five."""

import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

import numpy  # noqa: E402

from utils.figures import Figure, parse_arguments, report  # noqa: E402

COUNT, PIECE = 1_000_000, 256


def least_ms(call, times=5):
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        made = call()
        best = min(best, time.perf_counter() - start)
        if hasattr(made, "release"):
            made.release()
    return best * 1e3


def rows(address, step=PIECE):
    table = numpy.zeros((COUNT, 3), dtype=numpy.uint64)
    table[:, 0] = numpy.arange(COUNT, dtype=numpy.uint64) * numpy.uint64(step) + numpy.uint64(address)
    table[:, 1] = PIECE
    return table


def main():
    arguments = parse_arguments(__doc__)
    import nixl

    agent = nixl.nixl_agent("desc_perf", nixl.nixl_agent_config(backends=["UCX"]))
    memory = numpy.zeros(COUNT * PIECE, dtype=numpy.uint8)
    registered = agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    table = rows(memory.ctypes.data)
    tuples = [tuple(row) for row in table.tolist()]
    strided = numpy.array([[memory.ctypes.data, PIECE, 0, PIECE, COUNT]], dtype=numpy.uint64)
    copy = {"numpy copy": least_ms(table.copy)}
    figures = [
        Figure("get_xfer_descs, list of 10^6 tuples", least_ms(lambda: agent.get_xfer_descs(tuples, "DRAM")), "ms", 60, 40, copy),
        Figure("get_xfer_descs, array of 10^6 rows", least_ms(lambda: agent.get_xfer_descs(table, "DRAM")), "ms", 22, 4, copy),
        Figure("prep_xfer_dlist, 10^6 blocks as one strided row",
               least_ms(lambda: agent.prep_xfer_dlist("", strided, "DRAM")), "ms", 1, 0.1, copy),
    ]
    agent.deregister_memory(registered)
    return report("A million descriptors", figures, __doc__.split("\n\n")[1], arguments)


if __name__ == "__main__":
    sys.exit(main())
