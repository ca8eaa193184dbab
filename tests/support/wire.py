"""A link between this host and another network namespace that can be cut, slowed down and made lossy while it is used.

    with Wire() as wire:
        wire.near, wire.far         # addresses of the two ends
        wire.prefix                 # what runs a command at the far end
        wire.loss = 0.05            # each packet is lost with this probability
        wire.delay = 0.02           # seconds that each packet takes
        wire.cut = True             # nothing passes
        wire.passed, wire.lost      # packets so far

Two tun devices and a process of our own that carries packets from one to the other: what happens to a packet happens here, and the
kernels' TCP at both ends is the real one.
"""

import collections
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time

import pytest

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 9000
LIMIT_S = 30


class Wire:
    def __init__(self, seed=1):
        self.name = f"nixlwire{os.getpid()}"
        network = f"198.19.{os.getpid() % 250}"
        self.near, self.far = f"{network}.1", f"{network}.2"
        self.devices = [f"wn{os.getpid()}", f"wf{os.getpid()}"]
        self.prefix = ["ip", "netns", "exec", self.name]
        self.loss, self.delay, self.cut = 0.0, 0.0, False
        self.passed = self.lost = 0
        self._random, self._ends, self._closing = random.Random(seed), [], threading.Event()
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self):
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        self._carrier.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        if self._carrier.is_alive():
            self._carrier.join()
        for end in self._ends:
            os.close(end)
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", self.name], capture_output=True, timeout=LIMIT_S, check=False)

    def _set_up(self):
        if shutil.which("ip") is None:
            pytest.skip("no ip command (Debian package iproute2)")
        self._ip(f"netns add {self.name}")
        for device in self.devices:
            try:
                end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._ends.append(end)
                fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
            except OSError as error:
                pytest.skip(f"no tun devices here: {error}")
        near, far = self.devices
        for words in (f"link set {far} netns {self.name}", f"addr add {self.near} peer {self.far} dev {near}",
                      f"link set {near} mtu {MTU} up", f"-n {self.name} addr add {self.far} peer {self.near} dev {far}",
                      f"-n {self.name} link set {far} mtu {MTU} up", f"-n {self.name} link set lo up"):
            self._ip(words)

    def _ip(self, words):
        made = subprocess.run(["ip", *words.split()], capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if made.returncode:
            pytest.skip(f"no network namespaces here: ip {words}: {made.stderr.strip()}")

    def _carry(self):
        queue = collections.deque()  # (when, to which end, packet)
        poll = select.poll()
        for end in self._ends:
            poll.register(end, select.POLLIN)
        other = {self._ends[0]: self._ends[1], self._ends[1]: self._ends[0]}
        while not self._closing.is_set():
            wait = 0.05 if not queue else min(0.05, max(0.0, queue[0][0] - time.monotonic()))
            for end, _ in poll.poll(wait * 1000):
                self._take(end, other[end], queue)
            while queue and queue[0][0] <= time.monotonic():
                _, end, packet = queue.popleft()
                try:
                    os.write(end, packet)
                    self.passed += 1
                except OSError:  # the device's queue is full: lost, as on any wire
                    self.lost += 1

    def _take(self, end, to, queue):
        for _ in range(64):
            try:
                packet = os.read(end, MTU + 64)
            except BlockingIOError:
                return
            if self.cut or (self.loss and self._random.random() < self.loss):
                self.lost += 1
            else:
                queue.append((time.monotonic() + self.delay, to, packet))
