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
