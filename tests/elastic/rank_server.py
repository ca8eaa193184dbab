"""Gives launched processes their ranks, whichever launcher and host they come from.

One text line a TCP connection:

    "<hostname>\\n"                   ->  "<local> <global>\\n" or "<local> <global> <context>\\n"
    "RELEASE_RANK <global> <ctx>\\n"  ->  "OK\\n" or "ERROR: No ranks to release\\n"

local is the lowest number free on that host, global the smallest released id, else the number of live ranks; context
is what was stored when the id was released (the phase).
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time


class RankTable:
    """Who has which rank. Not thread-safe by itself; the server asks under its lock."""

    def __init__(self):
        self._live: dict[int, tuple[str, int]] = {}  # global: (host, local)
        self._released: set[int] = set()
        self._context: dict[int, str] = {}

    def assign(self, host: str) -> str:
        taken = {local for other, local in self._live.values() if other == host}
        local = next(number for number in range(len(taken) + 1) if number not in taken)
        if self._released:
            rank = min(self._released)
            self._released.remove(rank)
        else:
            rank = len(self._live)
        self._live[rank] = host, local
        return f"{local} {rank} {self._context[rank]}" if rank in self._context else f"{local} {rank}"

    def release(self, rank: int, context: str) -> str:
        if self._live.pop(rank, None) is None:
            return "ERROR: No ranks to release"
        self._released.add(rank)
        self._context[rank] = context
        return "OK"

    def answer(self, line: str) -> str:
        words = line.split()
        if not words:
            return "ERROR: Empty line"
        if words[0] != "RELEASE_RANK":
            return self.assign(words[0])
        if len(words) != 3 or not words[1].isdigit():
            return f"ERROR: Expected RELEASE_RANK <rank> <context>, got {line.strip()!r}"
        return self.release(int(words[1]), words[2])


class _Handler(socketserver.StreamRequestHandler):
    timeout = 10

    def handle(self):
        with contextlib.suppress(OSError):  # a client that is gone needs no answer
            line = self.rfile.readline(4096).decode(errors="replace")
            with self.server.lock:
                answer = self.server.table.answer(line)
            self.wfile.write(f"{answer}\n".encode())


class RankServer(socketserver.ThreadingTCPServer):
    """Serves in a thread from construction on; `close()` ends it. port 0 takes a free one, see `.port`."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int = 10_000, host: str = ""):
        super().__init__((host, port), _Handler)
        self.table, self.lock = RankTable(), threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def ask(address: str, port: int, line: str, timeout: float = 30) -> str:
    """Sends one line and returns the answer; waits up to `timeout` seconds for the server to come up."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((address, port), timeout=timeout) as connection:
                connection.sendall(f"{line}\n".encode())
                return connection.makefile().readline().strip()
        except ConnectionRefusedError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no rank server at {address}:{port} within {timeout} s") from error
            time.sleep(0.1)


def get_rank(address: str, port: int, host: str | None = None) -> tuple[int, int, int | None]:
    """(local, global, phase stored when the id was last released, or None) for a process on `host`."""
    words = ask(address, port, host or socket.gethostname()).split()
    return int(words[0]), int(words[1]), int(words[2]) if len(words) > 2 else None


def release_rank(address: str, port: int, rank: int, context: int) -> None:
    answer = ask(address, port, f"RELEASE_RANK {rank} {context}")
    if answer != "OK":
        raise RuntimeError(f"rank {rank} was not released: {answer}")
