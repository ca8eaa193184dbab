"""Object servers for tests and benchmarks, each a process of its own on a free port of 127.0.0.1.

    with S3Server() as server: ...        moto: behaves like S3, checks no signatures
    with NginxServer() as server: ...     plain PUT, GET and ranges, quick enough not to be the bottleneck
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
                    raise RuntimeError(f"{self.command()[0]} did not answer at {self.endpoint} within 30 s")
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


class NginxServer(_Server):
    """Objects under /BUCKET/..., kept in `folder` (give one in memory to measure the client)."""

    def __init__(self, bucket="bucket", root=None):
        super().__init__()
        self.bucket = bucket
        if root:
            shutil.rmtree(self.folder)
            self.folder = tempfile.mkdtemp(prefix="nixl_server_", dir=root)

    @staticmethod
    def missing():
        """Why it cannot run here, or None."""
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if not program:
            return "no nginx program (Debian package nginx-light)"
        built = subprocess.run([program, "-V"], capture_output=True, text=True).stderr
        return None if "http_dav_module" in built else "nginx without its WebDAV module"

    def command(self):
        config = os.path.join(self.folder, "nginx.conf")
        data = os.path.join(self.folder, "data")
        os.makedirs(os.path.join(data, self.bucket), exist_ok=True)
        with open(config, "w") as f:
            f.write(f"""
daemon off; master_process off; worker_processes 1; pid {self.folder}/pid; error_log {self.folder}/error error;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000;
  client_max_body_size 0; client_body_buffer_size 1m; client_body_in_single_buffer on;
  client_body_temp_path {self.folder}/tmp;
  server {{ listen 127.0.0.1:{self.port}; root {data};
    location / {{ dav_methods PUT DELETE; create_full_put_path on; }} }}
}}
""")
        program = shutil.which("nginx") or "/usr/sbin/nginx"
        return [program, "-p", self.folder, "-c", config]

    def params(self):
        return {"bucket": self.bucket, "endpoint_override": self.endpoint, "access_key": "key", "secret_key": "secret"}


class SinkServer(_Server):
    """Takes any PUT and throws the body away, answers any GET with (a range of) one pattern: quicker than any client.

    `SinkServer.pattern(size)` is what a GET answers; GET /counted gives the number of body bytes taken so far.
    """

    def __init__(self, size):
        super().__init__()
        self.size = size

    @staticmethod
    def pattern(size):
        return (b"0123456789abcdefghijklmnopqrstuvwxyz!" * (size // 37 + 1))[:size]

    def command(self):
        return [sys.executable, os.path.abspath(__file__), "sink", str(self.port), str(self.size)]

    def params(self):
        return {"bucket": "bucket", "endpoint_override": self.endpoint, "access_key": "key", "secret_key": "secret"}

    def counted(self):
        return int(self.request("GET", "/counted")[1])


def _serve_sink(port, size):
    import threading

    blob = os.memfd_create("blob")
    os.write(blob, SinkServer.pattern(size))
    taken = [0]

    def serve(client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        scratch = memoryview(bytearray(1 << 20))
        head = b""
        while True:
            while b"\r\n\r\n" not in head:
                got = client.recv(65536)
                if not got:
                    return
                head += got
            text, head = head.split(b"\r\n\r\n", 1)
            lines = text.decode().split("\r\n")
            method, path, _ = lines[0].split(" ")
            fields = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:])}
            if "expect" in fields:
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            left = int(fields.get("content-length", 0))
            taken[0] += left
            here = min(left, len(head))
            head, left = head[here:], left - here
            while left:
                got = client.recv_into(scratch, min(left, len(scratch)))
                if not got:
                    return
                left -= got
            if method != "GET":
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: \"0\"\r\n\r\n")
            elif path == "/counted":
                body = str(taken[0]).encode()
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            else:
                first, last = 0, size - 1
                status = b"200 OK"
                if "range" in fields:
                    first, last = (int(x) for x in fields["range"].split("=")[1].split("-"))
                    status = b"206 Partial Content\r\nContent-Range: bytes %d-%d/%d" % (first, last, size)
                client.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, last - first + 1))
                while first <= last:
                    first += os.sendfile(client.fileno(), blob, first, last - first + 1)

    def guarded(client):
        try:
            serve(client)
        except OSError:
            pass
        finally:
            client.close()

    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=guarded, args=(client,), daemon=True).start()


def _run_with_s3(command):
    """Runs a program with NIXL_TEST_S3 naming a server that has a bucket "bucket"; 77 where there is no such server."""
    if importlib.util.find_spec("moto") is None:
        print("SKIP: moto is not installed: no S3 server to test against")
        return 77
    with S3Server() as server:
        return subprocess.run(command, env={**os.environ, "NIXL_TEST_S3": server.endpoint}).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["sink"]:
        _serve_sink(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["with-s3"]:
        sys.exit(_run_with_s3(sys.argv[2:]))
