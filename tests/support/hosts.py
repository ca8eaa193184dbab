"""What tests of several hosts stand on: a second host (a network namespace with a link to this one) and a real etcd."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

LIMIT_S = 30


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FarHost:
    """`near` and `far`: addresses of the two ends; `prefix`: what runs a command over there."""

    def __init__(self):
        self.name = f"nixl{os.getpid()}"
        network = f"198.18.{os.getpid() % 250}"
        self.near, self.far = f"{network}.1", f"{network}.2"
        self.prefix = ["ip", "netns", "exec", self.name]

    def set_up(self):
        """Skips the test where that is not permitted."""
        if shutil.which("ip") is None:
            pytest.skip("no ip command (Debian package iproute2)")
        name, link = self.name, f"ve{os.getpid()}"
        for words in (f"netns add {name}", f"link add {link} type veth peer name far netns {name}",
                      f"addr add {self.near}/30 dev {link}", f"link set {link} up", f"-n {name} addr add {self.far}/30 dev far",
                      f"-n {name} link set far up", f"-n {name} link set lo up"):
            made = subprocess.run(["ip", *words.split()], capture_output=True, text=True, timeout=LIMIT_S, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: ip {words}: {made.stderr.strip()}")

    def tear_down(self):
        if shutil.which("ip") is None:
            return
        for words in (f"netns del {self.name}", f"link del ve{os.getpid()}"):
            subprocess.run(["ip", *words.split()], capture_output=True, timeout=LIMIT_S, check=False)


@contextlib.contextmanager
def far_host():
    host = FarHost()
    try:
        host.set_up()
        yield host
    finally:
        host.tear_down()


@contextlib.contextmanager
def etcd_server(folder, address="127.0.0.1"):
    """(endpoint, process) of an etcd that serves on `address` and keeps its data in `folder`."""
    if shutil.which("etcd") is None:
        pytest.skip("no etcd on PATH (Debian package etcd-server)")
    for attempt in range(3):
        client, peer = f"http://{address}:{free_port()}", f"http://127.0.0.1:{free_port()}"
        folder_of_this = os.path.join(folder, str(attempt))
        command = ["etcd", "--data-dir", folder_of_this, "--listen-client-urls", client, "--advertise-client-urls", client,
                   "--listen-peer-urls", peer]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if answers(client, server):
                yield client, server
                return
        finally:
            server.kill()
            server.wait()
    pytest.fail("etcd did not start, three times")


def answers(client, server):
    """Waits for an etcd; False when it ended, since somebody else had taken one of its ports meanwhile."""
    end = time.monotonic() + LIMIT_S
    while server.poll() is None:
        with contextlib.suppress(OSError):
            if b"true" in urllib.request.urlopen(client + "/health", timeout=1).read():
                return True
        assert time.monotonic() < end, "etcd does not answer"
        time.sleep(0.02)
    return False
