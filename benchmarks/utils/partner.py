"""How the two sides of a run find each other: a second process of this host, sockets, etcd, or one address that both know."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from utils.benchmark_base import Failure, Skip, Usage, make_agent
from utils.config import integer

JOIN_LIMIT_S = 60
LOCAL_LIMIT_S = 10  # for a target that this run has started
_MAX_METADATA = 1 << 30


def role_flags(parser):
    parser.add_argument("--mode", choices=("target", "initiator", "SG", "MG"), help="role of a two-sided run (SG, MG: "
                        "device groups of nixlbench, accepted)")
    parser.add_argument("--ip", default="", help="target: address to serve on (default all)")
    parser.add_argument("--target_ip", default="127.0.0.1", help="initiator: the target's address")
    parser.add_argument("--port", type=integer(0, 65535), default=5555)
    parser.add_argument("--tcp_store", default="", metavar="HOST:PORT", help="rendezvous without etcd: the same line on both "
                        "sides; who owns HOST and comes first is the target")
    parser.add_argument("--announce", action="store_true", help="target: print `port N` when it serves")
    parser.add_argument("--target_gpu_id", type=int, default=None, help="CUDA ordinal at the target (default --gpu_id)")


def names(options):
    return f"initiator-{options.benchmark_group}", f"target-{options.benchmark_group}"


class LocalTarget:
    """The target as a second process of this host, running the same script."""

    def __init__(self, options):
        skip = {"--mode", "--ip", "--target_ip", "--port", "--output", "--plot", "--format", "--etcd_endpoints", "--tcp_store"}
        words, passed, i = options.argv, [], 0
        while i < len(words):  # the flags of this run, less those of the role and the report
            name = words[i].split("=")[0].replace("-", "_").replace("__", "--", 1)
            if name in skip:
                i += 1 if "=" in words[i] else 2
                continue
            passed.append(words[i])
            i += 1
        command = [sys.executable, sys.argv[0], *passed, "--mode", "target", "--ip", "127.0.0.1", "--port", "0", "--announce"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = next((line for line in self.process.stdout if line.startswith(("port ", "SKIP: "))), "")
        if line.startswith("SKIP: "):
            raise Skip(line.split(": ", 2)[2].strip())
        if not line.startswith("port "):
            self.stop()
            raise Failure("the target process ended before it served")
        self.port = int(line.split()[1])

    def stop(self, limit_s=10):
        """Waits for its end; its exit code."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.process.stdout.close()


def serve_target(options, server_class):
    """The target's whole life over sockets. Returns the number of requests served."""
    initiator, own = names(options)
    agent = make_agent(own, options, enable_listen_thread=True, listen_port=options.port)
    if options.announce:
        print(f"port {agent.get_listen_port()}", flush=True)
    server = server_class(agent, options)
    server.serve(initiator, time.monotonic() + options.timeout_s)
    return server.asked


def connect_sockets(agent, options, port, limit_s):
    """Exchanges metadata with the target's listener; Failure after `limit_s`."""
    _, target = names(options)
    deadline, next_try = time.monotonic() + limit_s, 0.0
    while not agent.check_remote_metadata(target):
        now = time.monotonic()
        if now > deadline:
            raise Failure(f"no target could be reached at {options.target_ip}:{port} within {limit_s} s; warnings above give the "
                          "reason, if it answered")
        if now >= next_try:
            agent.fetch_remote_metadata(target, options.target_ip, port)
            next_try = now + 1.0
        time.sleep(0.002)
    agent.send_local_metadata(options.target_ip, port)
    return target


class Etcd:
    """The three calls of etcd's JSON gateway that a rendezvous needs."""

    def __init__(self, endpoints, group):
        endpoint = endpoints.split(",")[0].strip()
        self.base = endpoint if "://" in endpoint else f"http://{endpoint}"
        self.prefix = f"xferbench/{group}/"

    def _call(self, path, body):
        request = urllib.request.Request(f"{self.base}/v3/{path}", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError) as error:
            raise Failure(f"etcd at {self.base}: {error}; is it running, is --etcd_endpoints right?") from None

    def _key(self, name):
        return base64.b64encode((self.prefix + name).encode()).decode()

    def create(self, name, value):
        """True if the key did not exist and now holds `value` (bytes)."""
        key = self._key(name)
        put = {"requestPut": {"key": key, "value": base64.b64encode(value).decode()}}
        answer = self._call("kv/txn", {"compare": [{"key": key, "target": "VERSION", "version": "0"}], "success": [put]})
        return answer.get("succeeded", False)

    def wait(self, name, limit_s):
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            found = self._call("kv/range", {"key": self._key(name)}).get("kvs")
            if found:
                return base64.b64decode(found[0]["value"])
            time.sleep(0.05)
        return None

    def remove(self, name):
        self._call("kv/deleterange", {"key": self._key(name)})


def join_etcd(options):
    """Who comes first is the target. Returns (role, agent, partner's name, etcd)."""
    etcd = Etcd(options.etcd_endpoints, options.benchmark_group)
    initiator, target = names(options)
    os.environ.pop("NIXL_ETCD_ENDPOINTS", None)  # the agents exchange nothing through etcd themselves
    claim = f"{os.uname().nodename}:{os.getpid()}".encode()
    role = "target" if etcd.create("target", claim) else "initiator" if etcd.create("initiator", claim) else None
    if role is None:
        raise Failure(f"group '{options.benchmark_group}' has both roles taken; a stale run? delete the keys below "
                      f"{etcd.prefix} or give another --benchmark_group")
    other = "initiator" if role == "target" else "target"
    try:
        agent = make_agent(target if role == "target" else initiator, options)
        etcd.create(f"{role}-metadata", agent.get_agent_metadata())
        blob = etcd.wait(f"{other}-metadata", JOIN_LIMIT_S)
        if blob is None:
            raise Failure(f"no {other} joined group '{options.benchmark_group}' at {etcd.base} within {JOIN_LIMIT_S} s")
        partner = agent.add_remote_agent(blob).decode()
    except BaseException:
        leave_etcd(etcd, role)
        raise
    return role, agent, partner, etcd


def _send_blob(connection, blob):
    connection.sendall(len(blob).to_bytes(8, "little") + blob)


def _receive_blob(connection):
    with connection.makefile("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        blob = stream.read(size) if 0 < size <= _MAX_METADATA else b""
    if not blob or len(blob) != size:
        raise Failure("the partner at --tcp_store ended, or is none of ours")
    return blob


def _first_or_second(options):
    """A listening socket when this process is the first at the address, else a connection to who is."""
    host, _, port = options.tcp_store.rpartition(":")
    if not host or not port.isdigit():
        raise Usage(f"--tcp_store {options.tcp_store}: HOST:PORT is wanted")
    deadline = time.monotonic() + JOIN_LIMIT_S
    while True:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that is listened on is refused all the same
        try:
            listener.bind((host, int(port)))
            listener.listen(1)
            return listener, None
        except OSError:  # taken, or the address of another host
            listener.close()
        try:
            return None, socket.create_connection((host, int(port)), timeout=JOIN_LIMIT_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise Failure(f"nobody at --tcp_store {options.tcp_store} within {JOIN_LIMIT_S} s: {error}") from None
            time.sleep(0.1)


def join_tcp(options):
    """Who comes first is the target. Returns (role, agent, partner's name)."""
    initiator, target = names(options)
    listener, connection = _first_or_second(options)
    with listener or connection:
        agent = make_agent(target if listener else initiator, options)
        if listener:
            listener.settimeout(JOIN_LIMIT_S)
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                raise Failure(f"no initiator came to --tcp_store {options.tcp_store} within {JOIN_LIMIT_S} s") from None
        with connection:
            connection.settimeout(JOIN_LIMIT_S)
            _send_blob(connection, agent.get_agent_metadata())
            return "target" if listener else "initiator", agent, agent.add_remote_agent(_receive_blob(connection)).decode()


def leave_etcd(etcd, role):
    for name in (role, f"{role}-metadata"):
        try:
            etcd.remove(name)
        except Failure:
            return
