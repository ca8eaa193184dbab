"""KV-cache transfer between prefill and decode processes: paged blocks of all layers, pushed or pulled, then told.

A cache is a list of layers, each a tensor [2, blocks, heads, page tokens, head dim] (keys, then values); the heads are this
rank's share of all heads. Both sides may have other page sizes and other tensor-parallel degrees: what they share is cut into
units (a run of heads of one page, or the same tokens of one head) and addressed through prepared, strided descriptor lists, so
that a request costs two integer arrays.

Messages, all notifications of the agent: `kvopen:` a receiver's blocks for a request; `kv:<request>:<chunk>:<chunks>` a chunk has
arrived (after its data); `kvfail:<request>` the sender gave up; `kvread:<request>` a pull has finished, the blocks are free.

    prefill:  sender = KVSender(agent, cache, pool);      decode:  receiver = KVReceiver(agent, cache, pool)
              sender.connect(card of the receiver)                 receiver.connect(card of the sender)
              sender.push(block_ids, "r1").wait(10)                receiver.open("r1", block_ids, tokens); receiver.wait("r1", 10)

Not thread-safe: one thread an endpoint, which calls poll() or wait() often enough.
"""

import base64
import json
import logging
import time
import zlib

import numpy

from nixl_integrations.kv_layout import KVCache, Side, Units

log = logging.getLogger("nixl.kv_transfer")


class KVTransferError(Exception):
    """A request that failed; the text names it and the reason. Its blocks were given back, or will be by reclaim() as soon as
    nothing can move them any more."""


class KVPeerLost(KVTransferError):
    """The other side is gone."""


class KVTimeout(KVTransferError):
    """The other side did not finish in time."""


def _check_request(request_id, num_tokens=1):
    if not isinstance(request_id, str):
        raise TypeError(f"a request is named by a str, not {request_id!r}")
    if num_tokens < 1:
        raise ValueError(f"request '{request_id}': {num_tokens} tokens; one at least is needed")


class BlockPool:
    """Free block numbers of one cache. take() raises KVTransferError when too few are left."""

    def __init__(self, num_blocks):
        self._free = list(range(num_blocks))

    def take(self, count):
        """int64 [count] of block numbers."""
        if count > len(self._free):
            raise KVTransferError(f"{count} blocks wanted, {len(self._free)} free")
        taken, self._free = self._free[:count], self._free[count:]
        return numpy.array(taken, dtype=numpy.int64)

    def give_back(self, block_ids):
        """Takes blocks back, in any order."""
        self._free.extend(int(block) for block in block_ids)

    @property
    def num_free(self):
        """Blocks that take() can still give."""
        return len(self._free)


class _Peer:
    def __init__(self, agent, own, card):
        about = json.loads(card)
        self.name = agent.add_remote_agent(base64.b64decode(about["metadata"])).decode()
        self.side = Side(about["cache"])
        self.units = Units(own, self.side)
        self.shares = bool(self.units.heads)
        self.lists = None
        if self.shares:
            ours = agent.prep_xfer_dlist("NIXL_INIT_AGENT", own.rows(self.units), own.kind)
            theirs = agent.prep_xfer_dlist(self.name, self.side.rows(self.units), self.side.kind)
            self.lists = (ours, theirs)

    def request(self, agent, operation, own, block_ids, their_ids, first, count, message):
        here = own.indices(self.units, block_ids, first, count)
        there = self.side.indices(self.units, their_ids, first, count)
        handle = agent.make_prepped_xfer(operation, self.lists[0], here, self.lists[1], there, message)
        size = sum(heads for _, heads in self.units.heads) * self.units.tokens * own.token_bytes
        return handle, size * count * 2 * len(own.bases)

    def release(self, agent):
        for handle in self.lists or ():
            agent.release_dlist_handle(handle)
        self.lists = None


class _Endpoint:
    """What senders and receivers share: registration, cards, peers, messages."""

    def __init__(self, agent, cache, pool=None):
        self.agent, self.cache, self.pool = agent, cache, pool
        self.side = Side(cache.describe())
        self.registered = agent.register_memory([(*view.descriptor(), "") for view in cache.layers], cache.kind)
        self.peers = {}
        self._unstopped = []  # ([handles], block ids) of requests that failed while their transfers could not be stopped

    def card(self):
        """Bytes for the other side's connect()."""
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return json.dumps({"metadata": metadata, "cache": self.cache.describe()}).encode()

    def connect(self, card):
        """Makes a peer known by its card; returns its agent's name."""
        peer = _Peer(self.agent, self.side, card)
        self.peers[peer.name] = peer
        return peer.name

    def sharing(self):
        return [peer for peer in self.peers.values() if peer.shares]

    def alive(self, name):
        return self.agent.check_remote_metadata(name)

    def disconnect(self, name):
        peer = self.peers.pop(name, None)
        if peer:
            peer.release(self.agent)
            self.agent.remove_remote_agent(name)

    def poll_messages(self):
        """Reads what the other sides have told. A message that makes no sense is dropped with a warning; the others count."""
        self._stop_again()
        for name, messages in self.agent.get_new_notifs().items():
            for message in messages:
                try:
                    self._take(name, message)
                except (ValueError, KeyError, TypeError) as error:
                    log.warning("message of %d bytes from '%s' is dropped: %s", len(message), name, error)

    def close(self):
        for name in list(self.peers):
            self.disconnect(name)
        self.agent.deregister_memory(self.registered)

    def reclaim(self):
        """Blocks of requests that failed stay out of the pool as long as a transfer that could not be stopped may still move them;
        this gives back those that are safe by now. Returns how many requests still hold theirs."""
        self._stop_again()
        return len(self._unstopped)

    def _stop_again(self):
        unstopped, self._unstopped = self._unstopped, []
        for handles, block_ids in unstopped:
            self._stop(handles, block_ids)

    def _stop(self, handles, block_ids):
        """Releases the handles; gives the blocks back, or keeps them with what still runs."""
        running = [handle for handle in handles if not self._released(handle)]
        if running:
            self._unstopped.append((running, block_ids))
        else:
            self._give_back(block_ids)

    def _released(self, handle):
        try:
            self.agent.release_xfer_handle(handle)
        except Exception as error:  # of all errors one says that the transfer goes on
            return type(error).__name__ != "nixlRepostActiveError"
        return True

    def _give_back(self, block_ids):
        if self.pool is not None and block_ids is not None:
            self.pool.give_back(block_ids)


class _Transfers:
    """Requests under way for one push or pull; the blocks are given back exactly once, however it ends, and not before it has."""

    def __init__(self, endpoint, request_id, block_ids):
        self.endpoint, self.request_id, self.block_ids = endpoint, request_id, block_ids
        self.running, self.done_bytes, self.total_bytes, self.error = [], 0, 0, None
        self.started, self.seconds = time.perf_counter(), 0.0

    def add(self, peer, handle, size):
        self.running.append((peer, handle, size))
        self.total_bytes += size

    def start(self):
        agent = self.endpoint.agent
        try:
            for _, handle, _ in self.running:
                agent.transfer(handle)
        except Exception as error:
            self._fail(error)

    def poll(self):
        """True when it has ended; raises KVTransferError or KVPeerLost when it failed."""
        if self.error:
            raise self.error
        agent, left = self.endpoint.agent, []
        try:
            for peer, handle, size in self.running:
                if agent.check_xfer_state(handle) == "DONE":
                    agent.release_xfer_handle(handle)
                    self.done_bytes += size
                else:
                    left.append((peer, handle, size))
        except Exception as error:
            self._fail(error)
        self.running = left
        if left:
            return False
        self._end()
        return True

    def wait(self, timeout):
        deadline = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > deadline:
                self._fail(KVTimeout(f"request '{self.request_id}': {self.done_bytes} of {self.total_bytes} bytes moved within "
                                     f"{timeout} s"))
        return True

    def gigabytes_per_s(self):
        return self.total_bytes / self.seconds / 1e9 if self.seconds else 0.0

    def _end(self):
        if self.seconds == 0.0:
            self.seconds = time.perf_counter() - self.started
            blocks, self.block_ids = self.block_ids, None
            self.finished(blocks)

    def finished(self, block_ids):
        """After the last byte; sub-classes say who owns the blocks now."""

    def _fail(self, error):
        handles, self.running = [handle for _, handle, _ in self.running], []
        blocks, self.block_ids = self.block_ids, None
        self.endpoint._stop(handles, blocks)
        if not isinstance(error, KVTransferError):
            lost = type(error).__name__ in ("nixlRemoteDisconnectError", "nixlNotFoundError")
            error = (KVPeerLost if lost else KVTransferError)(f"request '{self.request_id}': {error}")
        self.error = error
        raise error


class KVPush(_Transfers):
    """A request's blocks on their way to receivers; the sender's pool has them back when it ended."""

    def finished(self, block_ids):
        """Blocks go back to the pool."""
        self.endpoint._give_back(block_ids)


class KVSender(_Endpoint):
    """Prefill side. Blocks given to push() return to the pool when the push has ended, well or not."""

    def __init__(self, agent, cache, pool=None, chunk_bytes=64 << 20):
        super().__init__(agent, cache, pool)
        self.chunk_bytes = chunk_bytes
        self._opened = {}  # request -> {receiver: (block ids, tokens)}

    def _take(self, name, message):
        if message.startswith(b"kvopen:"):
            head, _, body = message[len(b"kvopen:"):].partition(b"\n")
            about = json.loads(head)
            ids, tokens = numpy.frombuffer(body, dtype=numpy.int64), about["tokens"]
            if zlib.crc32(body) != about["crc"] or type(tokens) is not int or tokens < 1:
                raise ValueError("it is damaged")
            self._opened.setdefault(about["request"], {})[name] = (ids, tokens)
        elif message.startswith(b"kvread:"):
            self.on_read(name, message[len(b"kvread:"):].decode())

    def disconnect(self, name):
        super().disconnect(name)
        opened = {request: {peer: about for peer, about in by.items() if peer != name} for request, by in self._opened.items()}
        self._opened = {request: by for request, by in opened.items() if by}

    def on_read(self, receiver, request_id):
        """A receiver has pulled a request: its blocks may be used again. For sub-classes."""

    def opened(self):
        """Requests that every receiver which shares heads with us has opened."""
        self.poll_messages()
        return [request for request, by in self._opened.items() if len(by) >= len(self.sharing())]

    def push(self, block_ids, request_id, timeout=30.0):
        """Writes a request's blocks into the blocks that its receivers opened, chunk by chunk. Returns a KVPush under way."""
        _check_request(request_id)
        block_ids = self.side.block_numbers(block_ids)
        push = KVPush(self, request_id, block_ids)
        deadline = time.monotonic() + timeout
        while request_id not in self.opened():
            lost = [peer.name for peer in self.sharing() if not self.alive(peer.name)]
            if lost or time.monotonic() > deadline:
                self._give_back(block_ids)
                push.block_ids = None
                if lost:
                    raise KVPeerLost(f"request '{request_id}': receiver '{lost[0]}' is gone")
                raise KVTimeout(f"request '{request_id}' was not opened by its receivers within {timeout} s")
        for name, (their_ids, tokens) in self._opened.pop(request_id).items():
            self._add(push, self.peers[name], block_ids, their_ids, tokens)
        push.start()
        return push

    def _add(self, push, peer, block_ids, their_ids, tokens):
        num_units = -(-tokens // peer.units.tokens)
        unit_bytes = sum(count for _, count in peer.units.heads) * peer.units.tokens * self.cache.token_bytes * 2 * len(
            self.cache.layers)
        step = max(1, self.chunk_bytes // unit_bytes)
        chunks = -(-num_units // step)
        try:
            their_ids = peer.side.block_numbers(their_ids)
            for chunk in range(chunks):
                first = chunk * step
                message = f"kv:{push.request_id}:{chunk}:{chunks}".encode()
                handle, size = peer.request(self.agent, "WRITE", self.side, block_ids, their_ids, first,
                                            min(step, num_units - first), message)
                push.add(peer, handle, size)
        except Exception as error:
            push._fail(error)

    def give_up(self, request_id):
        """Tells the receivers that a request will not come."""
        for name in self._opened.pop(request_id, {}):
            self.agent.send_notif(name, f"kvfail:{request_id}".encode())


class KVPull(_Transfers):
    """A request's blocks on their way from senders, which are told when everything was read."""

    def finished(self, block_ids):
        """Senders may use their blocks again."""
        for name in self.sources:
            self.endpoint.agent.send_notif(name, f"kvread:{self.request_id}".encode())


class KVReceiver(_Endpoint):
    """Decode side. A request's blocks may be read only after wait() or a finished pull()."""

    def __init__(self, agent, cache, pool=None):
        super().__init__(agent, cache, pool)
        self._arrived = {}  # request -> {sender: (chunks seen, chunks)}
        self._expected = {}  # request -> block ids
        self._failed = set()
        self._quarantine = {}  # request that failed while its senders live -> block ids

    def open(self, request_id, block_ids, num_tokens):
        """Tells all senders that hold our heads which blocks the request shall go to. All of them must be connected."""
        _check_request(request_id, num_tokens)
        block_ids = self.side.block_numbers(block_ids)
        if len(block_ids) < self.cache.num_pages(num_tokens):
            raise ValueError(f"request '{request_id}': {num_tokens} tokens need {self.cache.num_pages(num_tokens)} blocks of "
                             f"{self.cache.page}, {len(block_ids)} given")
        self._check_sources(request_id, self.peers)
        self._expected[request_id] = block_ids
        body = block_ids.tobytes()
        head = json.dumps({"request": request_id, "tokens": num_tokens, "crc": zlib.crc32(body)}).encode()
        for peer in self.sharing():
            self.agent.send_notif(peer.name, b"kvopen:" + head + b"\n" + body)

    def _take(self, name, message):
        if message.startswith(b"kv:"):
            request, chunk, chunks = message[3:].decode().rsplit(":", 2)
            chunk, chunks = int(chunk), int(chunks)
            if not 0 <= chunk < chunks:
                raise ValueError(f"chunk {chunk} of {chunks}")
            seen = self._arrived.setdefault(request, {}).setdefault(name, [set(), chunks])
            seen[0].add(chunk)
        elif message.startswith(b"kvfail:"):
            self._failed.add(message[len(b"kvfail:"):].decode())

    def _check_sources(self, request_id, names):
        """Raises unless these senders are known and hold all heads of this cache together."""
        unknown = sorted(set(names) - set(self.peers))
        missing = set(self.side.head_range()).difference(*(self.peers[name].units.shared_heads() for name in names if name in self.peers))
        if unknown or missing:
            raise ValueError(f"request '{request_id}': " + (f"'{unknown[0]}' is not connected" if unknown else
                                                            f"no sender of heads {sorted(missing)} among {sorted(names)}"))

    def progress(self, request_id):
        """(chunks arrived, chunks known of), over all senders."""
        self.poll_messages()
        parts = self._arrived.get(request_id, {}).values()
        return sum(len(seen) for seen, _ in parts), sum(chunks for _, chunks in parts)

    def ready(self, request_id):
        """Has every chunk of every sender arrived?"""
        self.poll_messages()
        parts = self._arrived.get(request_id, {})
        return all(peer.name in parts and len(parts[peer.name][0]) == parts[peer.name][1] for peer in self.sharing())

    def wait(self, request_id, timeout):
        """Returns the request's blocks, filled. On failure they go back to the pool and KVPeerLost, KVTimeout or
        KVTransferError is raised."""
        deadline = time.monotonic() + timeout
        while not self.ready(request_id):
            parts = self._arrived.get(request_id, {})
            missing = [peer.name for peer in self.sharing()
                       if peer.name not in parts or len(parts[peer.name][0]) < parts[peer.name][1]]
            lost = [name for name in missing if not self.alive(name)]
            error = None
            if request_id in self._failed:
                error = KVTransferError(f"request '{request_id}': the sender gave up")
            elif lost and not self.ready(request_id):
                error = KVPeerLost(f"request '{request_id}': sender '{lost[0]}' is gone")
            elif time.monotonic() > deadline:
                error = KVTimeout(f"request '{request_id}': nothing or not everything from {missing} within {timeout} s")
            if error:
                self._forget(request_id)
                raise error
        blocks = self._expected.pop(request_id, None)
        self._arrived.pop(request_id, None)
        return blocks

    def _forget(self, request_id):
        blocks = self._expected.pop(request_id, None)
        if request_id in self._failed or not any(self.alive(peer.name) for peer in self.sharing()):
            self._failed.discard(request_id)
            self._arrived.pop(request_id, None)
            self._give_back(blocks)
        elif blocks is not None:
            self._quarantine[request_id] = blocks

    def reclaim(self):
        """Blocks of requests that ran out of time stay out of the pool also as long as a living sender may still write into them;
        this gives back those that are safe by now. Returns how many requests still hold theirs."""
        alive = any(self.alive(peer.name) for peer in self.sharing())
        for request_id in list(self._quarantine):
            if not alive or request_id in self._failed or self.ready(request_id):
                self._give_back(self._quarantine.pop(request_id))
                self._arrived.pop(request_id, None)
                self._failed.discard(request_id)
        return len(self._quarantine) + super().reclaim()

    def pull(self, request_id, block_ids, sources, num_tokens):
        """READs a request: `sources` {sender: its block ids}. Returns a KVPull under way; senders are told when it has ended."""
        _check_request(request_id, num_tokens)
        self._check_sources(request_id, sources)
        block_ids = self.side.block_numbers(block_ids)
        pull = KVPull(self, request_id, block_ids)
        pull.sources = [name for name in sources if self.peers[name].shares]
        try:
            for name in pull.sources:
                peer = self.peers[name]
                their_ids = peer.side.block_numbers(sources[name])
                handle, size = peer.request(self.agent, "READ", self.side, block_ids, their_ids, 0,
                                            -(-num_tokens // peer.units.tokens), b"")
                pull.add(peer, handle, size)
        except Exception as error:
            pull._fail(error)
        pull.start()
        return pull
