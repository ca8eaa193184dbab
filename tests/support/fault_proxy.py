"""A proxy in front of an HTTP server that misbehaves on demand.

    with FaultProxy(server.endpoint) as proxy:
        proxy.add("GET", "reset", times=2)      # the next two GETs are cut in the middle of their answer
        ... proxy.endpoint ...
        proxy.seen                              # ["GET reset", "GET reset", "GET", ...]

Kinds: "503" (answers SlowDown itself), "404"/"403"/"500" likewise, "reset" (half of the answer's body, then a reset),
"truncate" (half of the body, then an orderly end), "corrupt" (the checksum of the answer's body, and one byte of it changed), "slow" (`delay`
seconds before the answer), "drop" (reset in the middle of the request's body), "hang" (never answers).
"""

import base64
import http.client
import socket
import struct
import threading
import time
import urllib.parse


class FaultProxy:
    def __init__(self, upstream):
        url = urllib.parse.urlparse(upstream)
        self._upstream = (url.hostname, url.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._faults, self._lock, self.seen = [], threading.Lock(), []
        self._sockets, self._closing = set(), threading.Event()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._listener.close()
        for s in list(self._sockets):
            s.close()

    def add(self, method, kind, times=1, delay=0.0):
        with self._lock:
            self._faults.append([method, kind, times, delay])

    def _fault_for(self, method):
        with self._lock:
            for fault in self._faults:
                if fault[0] == method and fault[2] > 0:
                    fault[2] -= 1
                    self.seen.append(f"{method} {fault[1]}")
                    return fault[1], fault[3]
            self.seen.append(method)
        return None, 0

    def _accept(self):
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        try:
            reader = client.makefile("rb")
            while self._one(client, reader):
                pass
        except (OSError, http.client.HTTPException):
            pass
        finally:
            self._sockets.discard(client)
            client.close()

    def _one(self, client, reader):
        line = reader.readline()
        if not line:
            return False
        method, path, _ = line.decode().split(" ", 2)
        headers = {}
        while (header := reader.readline().strip()):
            name, value = header.decode().split(":", 1)
            headers[name.strip()] = value.strip()
        length = int(next((v for k, v in headers.items() if k.lower() == "content-length"), 0))
        kind, delay = self._fault_for(method)
        if kind == "drop":
            reader.read(length // 2)
            return _reset(client)
        body = reader.read(length)
        if kind == "hang":
            self._closing.wait()
            return False
        if kind and kind.isdigit():
            code = "SlowDown" if kind == "503" else "Injected"
            text = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
            client.sendall(f"HTTP/1.1 {kind} X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + (b"" if method == "HEAD" else text))
            return True
        status, reply_headers, reply = self._forward(method, path, headers, body)
        if kind == "slow":
            time.sleep(delay)
        if kind == "corrupt" and reply:
            sum_header = base64.b64encode(struct.pack(">I", _crc32c(reply))).decode()
            reply_headers.append(("x-amz-checksum-crc32c", sum_header))
            reply = bytes([reply[0] ^ 1]) + reply[1:]
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in reply_headers) + "\r\n"
        if kind in ("reset", "truncate"):
            client.sendall(head.encode() + reply[:len(reply) // 2])
            if kind == "truncate":
                client.shutdown(socket.SHUT_RDWR)
                return False
            return _reset(client)
        client.sendall(head.encode() + (b"" if method == "HEAD" else reply))
        return True

    def _forward(self, method, path, headers, body):
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body if body else None)
            answer = connection.getresponse()
            reply = answer.read()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "content-length")]
            length = answer.getheader("Content-Length") if method == "HEAD" else len(reply)
            return answer.status, [*kept, ("Content-Length", length or 0)], reply
        finally:
            connection.close()


def _reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return False


def _crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _row(value):
    for _ in range(8):
        value = (value >> 1) ^ 0x82F63B78 if value & 1 else value >> 1
    return value


_TABLE = [_row(value) for value in range(256)]
