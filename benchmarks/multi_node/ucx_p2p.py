#!/usr/bin/env python3
"""Initiator and target over UCX, on two hosts or as two processes of this one.

  --mode target --ip A --port P            serves until an initiator finished
  --mode initiator --target_ip A --port P  connects, runs, prints the table
  --etcd_endpoints URL                     the same line twice: who comes first is the target
  --tcp_store HOST:PORT                    the same without etcd: HOST is an address of the target's
  none of these                            the target is started here as a second process
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import run  # noqa: E402
from utils.two_sided import TwoSided  # noqa: E402


class UcxP2p(TwoSided):
    description = __doc__


if __name__ == "__main__":
    sys.exit(run(UcxP2p))
