"""Object servers for tests and benchmarks, each a process of its own on a free port of 127.0.0.1.

    with S3Server() as server: ...        moto: behaves like S3, checks no signatures
    with SinkServer(...) as server: ...   takes and gives any bytes, quick enough not to be the bottleneck
    python3 object_servers.py with-s3 PROGRAM [arguments]      runs a program beside an S3Server

`server.endpoint` is "http://127.0.0.1:PORT". Both end with the `with` block, and with the program that started them.
"""
import ctypes
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _end_with_parent():
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Server:
    def __init__(self):
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.folder = tempfile.mkdtemp(prefix="nixl_server_")
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self):
        self._log = open(os.path.join(self.folder, "log"), "ab")
        self.process = subprocess.Popen(self.command(), stdout=self._log, stderr=subprocess.STDOUT,
                                        preexec_fn=_end_with_parent)
        deadline = time.monotonic() + 30
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.command()[0]} ended: {open(self._log.name).read()[-2000:]}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
                connection.request("GET", "/")
                connection.getresponse().read()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.command()[0]} did not answer at {self.endpoint} within 30 s") from None
                time.sleep(0.02)

    def stop(self, sig=signal.SIGKILL):
        if self.process:
            self.process.send_signal(sig)
            self.process.wait()
            self._log.close()
            self.process = None

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body=body)
        reply = connection.getresponse()
        return reply.status, reply.read()


class S3Server(_Server):
    """`bucket` exists from the start."""

    def __init__(self, bucket="bucket"):
        super().__init__()
        self.bucket = bucket

    def command(self):
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self):
        super().start()
        status, text = self.request("PUT", f"/{self.bucket}")
        if status != 200:
            raise RuntimeError(f"moto: bucket {self.bucket} not made: {status} {text[:200]}")

    def params(self):
        return {"bucket": self.bucket, "endpoint_override": self.endpoint, "access_key": "key", "secret_key": "secret"}


class SinkServer(_Server):
    """Takes any PUT and throws the body away, answers any GET with (a range of) one pattern: quicker than any client.

    `program`: the native object_sink. `pattern()` is what a GET answers; `counted()` the number of body bytes taken so far.
    """

    def __init__(self, program, size):
        super().__init__()
        self.program, self.size = program, size

    def pattern(self):
        return (b"0123456789abcdefghijklmnopqrstuvwxyz!" * (self.size // 37 + 1))[:self.size]

    def command(self):
        return [self.program, "serve", str(self.port), str(self.size)]

    def params(self):
        return {"bucket": "bucket", "endpoint_override": self.endpoint, "access_key": "key", "secret_key": "secret"}

    def counted(self):
        return int(self.request("GET", "/counted")[1])

    def null_client(self, method, count, connections):
        """Seconds that a client needs which does next to nothing: with it, the server's own limit is measured."""
        done = subprocess.run([self.program, method, str(self.port), str(self.size), str(count), str(connections)], capture_output=True,
                              text=True, check=True)
        return float(done.stdout)


def _run_with_s3(command):
    """Runs a program with NIXL_TEST_S3 naming a server that has a bucket "bucket"; 77 where there is no such server."""
    if importlib.util.find_spec("moto") is None:
        print("SKIP: moto is not installed: no S3 server to test against")
        return 77
    with S3Server() as server:
        return subprocess.run(command, env={**os.environ, "NIXL_TEST_S3": server.endpoint}).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["with-s3"]:
        sys.exit(_run_with_s3(sys.argv[2:]))
