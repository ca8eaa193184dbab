"""Ray: whole storages read with a UUID; owners added again and again, forgotten while others are read from, and taken up anew."""
import subprocess
import sys

import pytest
from agents import done
from nixl._api import nixl_agent, nixl_agent_config
from peer import Peer, serve_tensors

torch = pytest.importorskip("torch")


def storages(count=3):
    """Tensors over whole storages, of which a program may use parts only."""
    return [torch.empty(0, dtype=torch.float32).set_(torch.zeros(1000).untyped_storage()) for _ in range(count)]


def read(one, owner, packed, uuid):
    """Fetches the owner's three tensors into fresh storages and returns what each is filled with."""
    targets = storages()
    regs = one.register_memory(targets, mem_type="cpu")
    h = one.initialize_xfer("READ", regs.trim(), one.deserialize_descs(packed), owner, uuid)
    one.transfer(h)
    done(one, h)
    one.release_xfer_handle(h)
    one.deregister_memory(regs)
    assert all((target == target[0]).all() for target in targets)
    return [int(target[0]) for target in targets]


def test_reads_of_one_owner():
    with Peer(serve_tensors, "owner") as other:
        one = nixl_agent("ray", nixl_agent_config(backends=["UCX"]))
        metadata, packed = other.receive()
        for round_ in range(3):
            for _ in range(3):
                assert one.add_remote_agent(metadata) == b"owner"
            assert read(one, "owner", packed, b"UUID%d" % round_) == [1, 2, 3]
            assert other.receive() == ("ray", b"UUID%d" % round_)
            one.remove_remote_agent("owner")
        other.send("stop")


def test_owner_deregisters_and_registers_again():
    with Peer(serve_tensors, "owner") as other:
        one = nixl_agent("ray", nixl_agent_config(backends=["UCX"]))
        metadata, packed = other.receive()
        one.add_remote_agent(metadata)
        assert read(one, "owner", packed, b"") == [1, 2, 3]
        for round_ in range(1, 4):
            other.send("renew")
            metadata, packed = other.receive()
            one.remove_remote_agent("owner")
            one.add_remote_agent(metadata)
            assert read(one, "owner", packed, b"") == [10 * round_ + i for i in (1, 2, 3)]
        other.send("stop")


def test_an_owner_is_forgotten_while_another_is_read_from():
    with Peer(serve_tensors, "first") as first, Peer(serve_tensors, "second") as second:
        one = nixl_agent("ray", nixl_agent_config(backends=["UCX"]))
        known = {"first": first.receive(), "second": second.receive()}
        for metadata, _ in known.values():
            one.add_remote_agent(metadata)
        targets = storages()
        regs = one.register_memory(targets, mem_type="cpu")
        for round_ in range(20):
            h = one.initialize_xfer("READ", regs.trim(), one.deserialize_descs(known["second"][1]), "second", b"r%d" % round_)
            one.transfer(h)
            one.remove_remote_agent("first")  # least recently used
            done(one, h)
            one.release_xfer_handle(h)
            assert second.receive() == ("ray", b"r%d" % round_)
            one.add_remote_agent(known["first"][0])
        assert [int(target[0]) for target in targets] == [1, 2, 3]
        assert read(one, "first", known["first"][1], b"") == [1, 2, 3]
        first.send("stop"), second.send("stop")


def test_shutdown_with_everything_alive():
    code = (
        "import torch; from nixl._api import nixl_agent, nixl_agent_config\n"
        "class Transport:\n"
        "    def __init__(self):\n"
        "        self.agent = nixl_agent('ray', nixl_agent_config(backends=['UCX'])); self.tensor = torch.zeros(1000)\n"
        "        self.regs = self.agent.register_memory([self.tensor]); half = self.regs.trim()\n"
        "        self.handle = self.agent.initialize_xfer('READ', half, half, 'ray', b'UUID'); self.agent.transfer(self.handle)\n"
        "    def __del__(self):\n"
        "        self.agent.release_xfer_handle(self.handle); self.agent.deregister_memory(self.regs); print('gone')\n"
        "transport = Transport()\n")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "gone" in ended.stdout and not ended.stderr, ended.stderr
