"""Lanes over a nixl agent, and the far side they talk to: memory of this process or of another one."""

import base64
import json
import time

from utils.benchmark_base import AgentLane, Failure, Skip
from utils.memory import INITIATOR_FILL, TARGET_FILL, first_difference, make_buffer, pattern

REPLY_LIMIT_S = 10


class NearFar:
    """The far side when it is in this very process."""

    def __init__(self, buffer, number):
        self.buffer, self.number = buffer, number

    def fill(self, offset, size, fill, salt):
        self.buffer.write(pattern(size, self.number, fill, salt), offset)

    def check(self, offset, size, fill, salt):
        return first_difference(self.buffer.read(offset, size), pattern(size, self.number, fill, salt))


class RemoteFar:
    """The far side in another process: asked by notifications, answered by `serve`."""

    def __init__(self, agent, peer, number):
        self.agent, self.peer, self.number, self._next = agent, peer, number, 0

    def ask(self, limit_s=REPLY_LIMIT_S, **request):
        self._next += 1
        tag = f"bench:reply:{self._next}:"
        self.agent.send_notif(self.peer, f"bench:ask:{self._next}:{json.dumps(request)}".encode())
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            gone = not self.agent.check_remote_metadata(self.peer)  # asked first: its answer may be here all the same
            for message in self.agent.get_new_notifs().get(self.peer, []):
                text = message.decode(errors="replace")
                if text.startswith(tag):
                    return json.loads(text[len(tag):])
            if gone:
                raise Failure(f"the partner '{self.peer}' is gone")
        raise Failure(f"the partner '{self.peer}' did not answer '{request['do']}' within {limit_s} s")

    def fill(self, offset, size, fill, salt):
        self.ask(do="fill", offset=offset, size=size, fill=fill, salt=salt, pattern=self.number)

    def check(self, offset, size, fill, salt):
        return self.ask(do="check", offset=offset, size=size, fill=fill, salt=salt, pattern=self.number)["bad"]

    def allocate(self, size, options):
        """A buffer over there, registered; returns its first descriptor as (address, size, device)."""
        answer = self.ask(limit_s=60, do="allocate", size=size, kind=options.target_mem, device=options.target_gpu,
                          vmm=options.enable_vmm)
        if answer.get("error", "").startswith("Skip: "):
            raise Skip(f"at the partner: {answer['error'][len('Skip: '):]}")
        if "error" in answer:
            raise Failure(f"the partner '{self.peer}': {answer['error']}")
        self.agent.add_remote_agent(base64.b64decode(answer["metadata"]))
        return answer["address"], size, answer["device"]


class Server:
    """The target's half of RemoteFar: one buffer at a time, until told to stop or the initiator is gone."""

    def __init__(self, agent, options):
        self.agent, self.options, self.buffer, self.registered = agent, options, None, None
        self.asked = 0

    def serve(self, initiator, deadline):
        """Answers until `bye`. Failure when the initiator vanishes or the deadline passes."""
        seen = False
        while time.monotonic() < deadline:
            if not self.agent.check_remote_metadata(initiator):
                if seen:
                    raise Failure(f"the initiator '{initiator}' is gone")
                time.sleep(0.001)  # its first question may arrive before its metadata: it waits in the agent
                continue
            seen = True
            messages = self.agent.get_new_notifs().get(initiator, [])
            for message in messages:
                text = message.decode(errors="replace")
                if not text.startswith("bench:ask:"):
                    continue
                number, _, request = text[len("bench:ask:"):].partition(":")
                request = json.loads(request)
                answer = self.answer(request)
                self.agent.send_notif(initiator, f"bench:reply:{number}:{json.dumps(answer)}".encode())
                if request["do"] == "bye":
                    self.drop()
                    return
            if not messages and self.options.enable_pt:
                time.sleep(0.0005)
        raise Failure(f"no initiator finished within --timeout_s {self.options.timeout_s}")

    def answer(self, request):
        self.asked += 1
        do = request["do"]
        if do == "allocate":
            return self.allocate(request)
        if do == "fill":
            self.buffer.write(pattern(request["size"], request["pattern"], request["fill"], request["salt"]), request["offset"])
        elif do == "check":
            seen = self.buffer.read(request["offset"], request["size"])
            return {"bad": first_difference(seen, pattern(request["size"], request["pattern"], request["fill"], request["salt"]))}
        elif do == "corrupt":  # for the tests of the suite: one wrong byte, so that a check must fail
            self.buffer.write(self.buffer.read(request["offset"], 1) ^ 1, request["offset"])
        return {}

    def allocate(self, request):
        self.drop()
        try:
            self.buffer = make_buffer(request["kind"], request["size"], request["device"], request["vmm"])
            descs = [(self.buffer.address, self.buffer.size, self.buffer.device, "")]
            self.registered = self.agent.register_memory(descs, request["kind"])
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"address": self.buffer.address, "device": self.buffer.device,
                "metadata": base64.b64encode(self.agent.get_agent_metadata()).decode()}

    def drop(self):
        if self.registered is not None:
            self.agent.deregister_memory(self.registered)
            self.registered = None
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None


class MemoryLane(AgentLane):
    """`batch` pieces of `size` bytes between a slice of our buffer and the same slice of the far one."""

    def __init__(self, agent, peer, options, size, near, near_offset, far, far_desc, far_offset):
        self.agent, self.peer, self.options, self.size = agent, peer, options, size
        self.near, self.near_offset = near, near_offset
        self.far, self.far_desc, self.far_offset = far, far_desc, far_offset
        self.bytes = size * options.batch_size
        self._registered = self._sides = None

    def register(self):
        self._registered = self.agent.register_memory(
            [(self.near.address + self.near_offset, self.bytes, self.near.device, "")], self.near.kind)

    def deregister(self):
        self.agent.deregister_memory(self._registered)

    def _descs(self, address, device, kind):
        pieces = [(address + i * self.size, self.size, device) for i in range(self.options.batch_size)]
        return self.agent.get_xfer_descs(pieces, kind)

    def open(self):
        options, agent = self.options, self.agent
        local = self._descs(self.near.address + self.near_offset, self.near.device, self.near.kind)
        remote = self._descs(self.far_desc[0] + self.far_offset, self.far_desc[2], options.target_mem)
        if options.prepared_xfer:
            self._sides = (agent.prep_xfer_dlist("NIXL_INIT_AGENT", local), agent.prep_xfer_dlist(self.peer, remote))
            order = list(range(options.batch_size))
            self.handle = agent.make_prepped_xfer(options.operation, self._sides[0], order, self._sides[1], order)
        else:
            self.handle = agent.initialize_xfer(options.operation, local, remote, self.peer)

    def close(self):
        super().close()
        for side in self._sides or ():
            self.agent.release_dlist_handle(side)
        self._sides = None

    def fill(self, salt):
        ours = pattern(self.bytes, self.options.pattern, INITIATOR_FILL, salt)
        self.near.write(ours, self.near_offset)
        self.far.fill(self.far_offset, self.bytes, TARGET_FILL, salt)

    def check(self, salt):
        if self.options.operation == "WRITE":
            return self.far.check(self.far_offset, self.bytes, INITIATOR_FILL, salt)
        wanted = pattern(self.bytes, self.options.pattern, TARGET_FILL, salt)
        return first_difference(self.near.read(self.near_offset, self.bytes), wanted)


def make_memory_lanes(agent, peer, options, size, near, far, far_desc, offsets=(0, 0)):
    """num_threads lists of pipeline_depth lanes, side by side in the two buffers from `offsets` (near, far) on."""
    step = size * options.batch_size
    lanes, index = [], 0
    for _ in range(options.num_threads):
        thread = []
        for _ in range(options.pipeline_depth):
            thread.append(MemoryLane(agent, peer, options, size, near, offsets[0] + index * step, far, far_desc,
                                     offsets[1] + index * step))
            index += 1
        lanes.append(thread)
    return lanes


def lane_bytes(options, size):
    return size * options.batch_size * options.num_threads * options.pipeline_depth
