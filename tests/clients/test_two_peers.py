"""The examples of two peers: the target listens, the initiator fetches and writes over prepared lists, posted again and again."""
import pytest
from agents import agent, done, until
from nixl._api import nixl_agent, nixl_agent_config
from peer import Peer

torch = pytest.importorskip("torch")
ROUNDS = 3


def target(channel):
    one = nixl_agent("target", nixl_agent_config(True, True, 0))
    tensor = torch.zeros(1000)
    one.register_memory(tensor)
    channel.send(one.get_listen_port())
    until(lambda: one.check_remote_metadata("initiator"))
    one.send_notif("initiator", one.get_serialized_descs(one.get_xfer_descs(tensor)))
    for _ in range(ROUNDS):
        until(lambda: one.check_remote_xfer_done("initiator", b"UUID"))
        channel.send(tensor.unique().tolist())
        channel.recv()
    until(lambda: not one.check_remote_metadata("initiator"))
    channel.send("forgotten")


def test_write_and_forget():
    with Peer(target) as other:
        init = nixl_agent("initiator", nixl_agent_config(True, False))
        here = torch.ones(1000)
        init.register_memory(here)
        port = other.receive()
        init.fetch_remote_metadata("target", "127.0.0.1", port)
        init.send_local_metadata("127.0.0.1", port)
        until(lambda: init.check_remote_metadata("target"))
        remote = init.deserialize_descs(until(lambda: init.get_new_notifs())["target"][0])
        local = init.prep_xfer_dlist("NIXL_INIT_AGENT", init.get_xfer_descs(here))
        far = init.prep_xfer_dlist("target", remote)
        h = init.make_prepped_xfer("WRITE", local, [0], far, [0], b"UUID")
        for round_ in range(ROUNDS):
            here.fill_(round_)
            init.transfer(h)
            done(init, h)
            assert other.receive() == [round_]
            other.send("next")
        h.release(), local.release(), far.release()
        init.remove_remote_agent("target")
        init.invalidate_local_metadata("127.0.0.1", port)
        assert other.receive() == "forgotten"


def listener(channel):
    one = nixl_agent("target", nixl_agent_config(True, True, 0))
    channel.send(one.get_listen_port())
    descs = one.deserialize_descs(channel.recv())
    until(lambda: one.check_remote_metadata("sender", descs))
    channel.send("covered")


def test_partial_metadata_by_ip():
    with Peer(listener) as other:
        port = other.receive()
        sender, tensor = agent("sender", "UCX"), torch.zeros(100)
        regs = sender.register_memory(tensor)
        other.send(sender.get_serialized_descs(regs.trim()))
        sender.send_partial_agent_metadata(regs, True, ["UCX"], "127.0.0.1", port)
        assert other.receive() == "covered"
