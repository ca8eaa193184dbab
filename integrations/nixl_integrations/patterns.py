"""Transfer patterns between groups of agents: pairwise, many to one, one to many, tensor parallel, and aggregation.

Every function runs in one process, with that process's agent and tensor, and returns the handles of transfers that it has
started; `finish` waits for them. A remote place is (peer name, address, bytes, kind, device), as `place` gives it; tensors must be
registered by their owners and the peers' metadata loaded.
"""

import logging
import time

import numpy

from nixl_integrations.memory_view import MemoryView

log = logging.getLogger("nixl.patterns")
GRADIENT = b"gradient"


def place(agent_name, tensor):
    """Where a tensor of ours is, for peers: plain values that any channel can carry."""
    view = MemoryView(tensor)
    return agent_name, view.address, view.nbytes, view.kind, view.device


def _start(agent, operation, view, offset, size, peer, address, tag):
    local = agent.get_xfer_descs([(view.address + offset, size, view.device)], view.kind)
    remote = agent.get_xfer_descs([(address, size, peer[4])], peer[3])
    handle = agent.initialize_xfer(operation, local, remote, peer[0], tag)
    agent.transfer(handle)
    return handle


def finish(agent, handles, timeout=60.0):
    """Waits for all without spinning, releases them; raises what a failed one raises, TimeoutError when the time is over. A warning
    names a transfer that could not be stopped then: its memory stays in use until it has ended."""
    deadline = time.monotonic() + timeout
    try:
        for handle in handles:
            if handle.wait(max(deadline - time.monotonic(), 0)) != "DONE":
                raise TimeoutError(f"a transfer did not end within {timeout} s")
    finally:
        for handle in handles:
            try:
                agent.release_xfer_handle(handle)
            except Exception as error:  # must hide neither the first error nor the other handles
                log.warning("%r is still running: %s", handle, error)


def pairwise(agent, tensor, target, tag=b"pairwise", operation="WRITE"):
    """The whole tensor to (or from) one target of the same size."""
    view = MemoryView(tensor)
    if view.nbytes != target[2]:
        raise ValueError(f"{view.nbytes} bytes here, {target[2]} at '{target[0]}'")
    return [_start(agent, operation, view, 0, view.nbytes, target, target[1], tag)]


def many_to_one(agent, tensor, target, part, num_parts, tag=GRADIENT):
    """The tensor into part `part` of `num_parts` equal parts of one target."""
    view = MemoryView(tensor)
    if view.nbytes * num_parts != target[2]:
        raise ValueError(f"{num_parts} parts of {view.nbytes} bytes do not make the {target[2]} of '{target[0]}'")
    return [_start(agent, "WRITE", view, 0, view.nbytes, target, target[1] + part * view.nbytes, tag)]


def one_to_many(agent, tensor, targets, tag=b"broadcast"):
    """The whole tensor to every target; each is notified."""
    return [handle for target in targets for handle in pairwise(agent, tensor, target, tag)]


def tensor_parallel(agent, shard, rank, group_size, targets, tag=b"shard"):
    """Re-shards a matrix cut by columns: `shard` is share `rank` of `group_size`; `targets` are the places of all shards of the
    other group, in rank order. Columns that a target does not hold are not sent; returns [] handles for those."""
    view = MemoryView(shard)
    rows, columns = view.shape
    total = columns * group_size
    if total % len(targets):
        raise ValueError(f"{total} columns cannot be cut into {len(targets)} equal shards")
    theirs = total // len(targets)
    first, handles = rank * columns, []
    for index, target in enumerate(targets):
        start, end = max(first, index * theirs), min(first + columns, (index + 1) * theirs)
        if start >= end:
            continue
        size = (end - start) * view.itemsize
        local = numpy.array([[view.address + (start - first) * view.itemsize, size, view.device, columns * view.itemsize, rows]],
                            dtype=numpy.uint64)
        remote = numpy.array([[target[1] + (start - index * theirs) * view.itemsize, size, target[4], theirs * view.itemsize,
                               rows]], dtype=numpy.uint64)
        sides = (agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, view.kind), agent.prep_xfer_dlist(target[0], remote, target[3]))
        order = numpy.arange(rows)
        handle = agent.make_prepped_xfer("WRITE", sides[0], order, sides[1], order, tag)
        for side in sides:
            agent.release_dlist_handle(side)
        agent.transfer(handle)
        handles.append(handle)
    return handles


def aggregate(agent, workers, tag=GRADIENT, timeout=60.0):
    """The aggregator's half of many_to_one: waits until every worker, whose metadata was loaded, has written or is gone.
    Returns (written, lost)."""
    waiting, written, lost = list(workers), [], []
    deadline = time.monotonic() + timeout
    while waiting:
        for worker in list(waiting):
            if agent.check_remote_xfer_done(worker, tag):
                written.append(worker)
            elif not agent.check_remote_metadata(worker):  # its last message may have come just before
                (written if agent.check_remote_xfer_done(worker, tag) else lost).append(worker)
            else:
                continue
            waiting.remove(worker)
        if waiting and time.monotonic() > deadline:
            raise TimeoutError(f"{waiting} neither wrote nor died within {timeout} s")
    return written, lost
