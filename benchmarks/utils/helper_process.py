"""A second agent in a process of its own, driven by lines of JSON over pipes: what bench_local.py measures against.

Run as `python benchmarks/utils/helper_process.py` it is that process; HelperProcess is the other end.
"""

import base64
import json
import os
import pathlib
import select
import subprocess
import sys
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

ANSWER_LIMIT_S = 120


class HelperProcess:
    """Starts the process; `ask` sends one request and returns its answer, or raises with the process's own reason."""

    def __init__(self, name, prog_thread=True, env=None):
        command = [sys.executable, __file__, name, "1" if prog_thread else "0"]
        self.name, self._read = name, b""
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                                        env={**os.environ, **(env or {})})
        self.ask(do="hello")

    def ask(self, **request):
        self.tell(**request)
        return self.answer()

    def tell(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self):
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while not (line := self._line(deadline)).startswith(b"{"):  # log lines come the same way
            pass
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"helper '{self.name}': {answer['error']}")
        return answer

    def _line(self, deadline):
        while b"\n" not in self._read:
            if not select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"helper '{self.name}' did not answer within {ANSWER_LIMIT_S} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise RuntimeError(f"helper '{self.name}' ended with {self.process.wait()}")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line

    def metadata(self):
        return base64.b64decode(self.ask(do="metadata")["blob"])

    def cpu_ns(self):
        """CPU time of all threads of the process so far."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class _Helper:
    def __init__(self, name, prog_thread):
        import nixl

        config = nixl.nixl_agent_config(enable_prog_thread=prog_thread, backends=["UCX"])
        self.agent, self.buffer, self.registered = nixl.nixl_agent(name, config), None, None

    def hello(self):
        return {"pid": os.getpid()}

    def allocate(self, kind, size, device=0, vmm=False, piece=None, torch=False, shared=False):
        from utils.memory import DeviceBuffer, HostBuffer, TorchBuffer

        if self.registered is not None:
            self.agent.deregister_memory(self.registered)
            self.buffer.close()
        if torch:
            self.buffer = TorchBuffer(size, device)
        else:
            self.buffer = DeviceBuffer(size, device, vmm, piece) if kind == "VRAM" else HostBuffer(size, shared)
        self.registered = self.agent.register_memory([(self.buffer.address, size, device, "")], kind)
        return {"address": self.buffer.address}

    def metadata(self):
        return {"blob": base64.b64encode(self.agent.get_agent_metadata()).decode()}

    def fill(self, number, fill):
        from utils.memory import pattern

        self.buffer.write(pattern(self.buffer.size, number, fill))
        return {}

    def crc(self, offset, size):
        return {"crc": zlib.crc32(self.buffer.read(offset, size))}

    def load(self, blob):
        return {"name": self.agent.add_remote_agent(base64.b64decode(blob)).decode()}

    def echo(self, peer, count):
        """Sends back `count` messages of `peer`, polling."""
        seen = 0
        while seen < count:
            for message in self.agent.get_new_notifs().get(peer, []):
                self.agent.send_notif(peer, message)
                seen += 1
        return {}

    def small_transfers(self, peer, address, device, kind, seconds):
        """64 B transfers to `peer` for a while; their times in microseconds, sorted."""
        agent, offset = self.agent, 64
        local = agent.get_xfer_descs([(self.buffer.address, 64, self.buffer.device)], self.buffer.kind)
        remote = agent.get_xfer_descs([(address + offset, 64, device)], kind)
        handle = agent.initialize_xfer("WRITE", local, remote, peer)
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.perf_counter_ns()
            state = agent.transfer(handle)
            while state != "DONE":
                state = agent.check_xfer_state(handle)
            times.append((time.perf_counter_ns() - start) / 1e3)
            time.sleep(0.0005)
        agent.release_xfer_handle(handle)
        times.sort()
        return {"count": len(times), "p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)]}


def main():
    helper = _Helper(sys.argv[1], sys.argv[2] == "1")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(helper, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
