"""Agents for tests. Backend UCX where programs name it; the reference backend where faults are wanted."""
import contextlib
import os
import pathlib
import tempfile
import time

os.environ["NIXL_LOOPBACK"] = "y"

import nixl
import pytest
from nixl._api import nixl_agent, nixl_agent_config


def need_backend(name):
    about = nixl.plugin_report().get(name, {"available": False, "reason": "no such backend"})
    if not about["available"]:
        pytest.skip(f"{name}: {about['reason']}")


def agent(name, backend="LOOPBACK", **config):
    need_backend(backend)
    return nixl_agent(name, nixl_agent_config(backends=[backend], **config))


def introduce(*agents):
    for one in agents:
        for other in agents:
            if one is not other:
                one.add_remote_agent(other.get_agent_metadata())


@contextlib.contextmanager
def stderr_text():
    """Gives a function that returns all that was written to descriptor 2 so far. Unlike pytest's `capfd`, which loses what other
    threads write while it is read out, it may be asked again and again."""
    with tempfile.NamedTemporaryFile("ab") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: pathlib.Path(file.name).read_text(errors="replace")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def until(condition, seconds=10, drive=()):
    """Waits for a condition; agents in `drive` make progress meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        for one in drive:
            one.get_new_notifs() if not isinstance(one, tuple) else one[0].update_notifs()
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.0005)


def done(one, handle, drive=(), seconds=20):
    until(lambda: one.check_xfer_state(handle) == "DONE", seconds, drive)
