"""Handles of prepared lists and transfers: truthy, released once however often they are released, usable after the agent."""
import os
import weakref

from . import _bindings as nixlBind


def _native(agent):
    return getattr(agent, "agent", agent)


class _Handle:
    """A native object and the agent that it belongs to."""

    __slots__ = ()

    def __init__(self, agent, value):
        self._handle = value
        self._agent = agent
        self._released = False

    def release(self):
        """Gives the native object back. Doing it again does nothing."""
        if self._released:
            return
        self._release_native()
        self._released = True

    def __bool__(self):
        return True

    def __repr__(self):
        return f"<{type(self).__name__} {self._handle:#x} released={self._released}>"

    def __del__(self):
        try:
            self.release()
        except Exception:  # the interpreter or the agent is going
            pass


class nixl_prepped_dlist_handle(_Handle):
    """One prepared side of transfers."""

    __slots__ = ("_handle", "_agent", "_released")

    def _release_native(self):
        _native(self._agent).releasedDlistH(self._handle)


class nixl_xfer_handle(_Handle):
    """One transfer request; ``await handle`` works on a posted one."""

    __slots__ = ("_handle", "_agent", "_released")

    def _release_native(self):
        _native(self._agent).releaseXferReq(self._handle)

    def wait(self, timeout=None):
        """Blocks without spinning until the transfer ends: "DONE", or "PROC" after `timeout` seconds. Failures raise."""
        status = _native(self._agent).waitXferReq(self._handle, float("1e9") if timeout is None else float(timeout))
        return "DONE" if status == nixlBind.NIXL_SUCCESS else "PROC"

    def __await__(self):
        return _finished(_native(self._agent), self._handle).__await__()


class _Wakeups:
    """Waiters of one event loop for the events of one agent. The descriptor is watched only while someone waits."""

    def __init__(self, native, loop):
        self._fd = native.eventFd()
        self._loop = weakref.ref(loop)
        self._waiters = set()

    def _woken(self):
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            pass
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, still_running):
        loop = self._loop()
        waiter = loop.create_future()
        if not self._waiters:
            loop.add_reader(self._fd, self._woken)
        self._waiters.add(waiter)
        try:
            if still_running():
                await waiter
        finally:
            self._waiters.discard(waiter)
            if not self._waiters:
                loop.remove_reader(self._fd)


async def _finished(native, handle):
    def running():
        return native.getXferStatus(handle) != nixlBind.NIXL_SUCCESS

    import asyncio

    if not running():
        return "DONE"
    loop = asyncio.get_running_loop()
    try:
        wakeups = native.__dict__.setdefault("_wakeups", weakref.WeakKeyDictionary())
        if loop not in wakeups:
            wakeups[loop] = _Wakeups(native, loop)
    except nixlBind.nixlNotAllowedError:  # no progress thread: the loop itself makes the progress
        while running():
            await asyncio.sleep(0)
        return "DONE"
    while running():
        await wakeups[loop].wait(running)
    return "DONE"
