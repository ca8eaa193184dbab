"""Runs a client's other half in a process of its own; the halves talk over pipes in pickles of plain values."""
import multiprocessing


class Peer:
    """`body(channel)` in a fresh process; send and receive with bounded waits. Ends with the `with` block."""

    def __init__(self, body, *arguments):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self.process = context.Process(target=body, args=(there, *arguments), daemon=True)
        self.process.start()
        there.close()

    def send(self, value):
        self._here.send(value)

    def receive(self, seconds=60):
        assert self._here.poll(seconds), "the other process did not answer"
        return self._here.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._here.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve_tensors(channel, name):
    """The half of an owner: registers three tensors of 1000 floats filled with 1, 2, 3 and answers with its metadata and their
    descriptors, packed. Passes on its notifications as (sender, message). On "renew" it deregisters them, registers others filled with
    11, 12, 13 and answers again; ends at any other word."""
    import torch
    from nixl._api import nixl_agent, nixl_agent_config

    one = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    offset, regs = 0, None
    while True:
        if regs is not None:
            one.deregister_memory(regs)
        tensors = [torch.full((1000,), float(offset + i + 1)) for i in range(3)]
        regs = one.register_memory(tensors)
        channel.send((one.get_agent_metadata(), one.get_serialized_descs(one.get_xfer_descs(tensors))))
        while not channel.poll(0.001):
            for sender, messages in one.update_notifs().items():
                while messages:
                    channel.send((sender, messages.pop(0)))
        if channel.recv() != "renew":
            return
        offset += 10
