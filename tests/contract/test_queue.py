"""TransferQueue's sockets: all are created in one place, and none answers or unpickles messages without Ray's token."""

import ast
import os
import pickle
import time
from pathlib import Path

import pytest
import transfer_queue
import zmq
from transfer_queue.utils import zmq_utils
from zmq.utils import z85

from verl_aqn.integrations.verl import queue
from verl_aqn.integrations.verl.queue import USERS, create_guarded_socket

FOLDER = Path(transfer_queue.__file__).parent


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


def test_every_socket_is_made_by_the_function_that_is_replaced():
    users = set()
    for path in FOLDER.rglob("*.py"):
        tree = ast.parse(path.read_text())
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if "create_zmq_socket" in called:
            users.add(path)
        made = {name for name in called if name.endswith(".socket")} - {"socket.socket"}
        assert made == ({"ctx.socket"} if path == Path(zmq_utils.__file__) else set()), path
    assert users == {Path(module.__file__) for module in USERS}


def test_the_function_is_replaced_for_this_process_and_for_actors(monkeypatch):
    """Ray sends actor classes by value and their callees by name, so processes without our plugin use our function."""
    from ray import cloudpickle
    from transfer_queue.controller import TransferQueueController

    for module in USERS:
        monkeypatch.setattr(module, "create_zmq_socket", module.create_zmq_socket)
    queue.guard()
    cls = TransferQueueController.__ray_metadata__.modified_class
    assert b"verl_aqn.integrations.verl.queue" in cloudpickle.dumps(cls)


def exchange(context: zmq.Context, server: zmq.Socket, client: zmq.Socket, seconds: float = 0.5) -> bool:
    port = server.bind_to_random_port("tcp://127.0.0.1")
    client.connect(f"tcp://127.0.0.1:{port}")
    client.linger = 0  # otherwise messages that nobody receives would keep the context open
    client.send(pickle.dumps("harm"))
    return bool(server.poll(1000 * seconds))


def test_those_with_the_token_speak(context):
    server, client = (create_guarded_socket(context, kind, "127.0.0.1") for kind in (zmq.ROUTER, zmq.DEALER))
    assert exchange(context, server, client, 10)


@pytest.mark.parametrize("who", ["no key", "a key of their own", "another token"])
def test_who_has_no_token_is_not_heard(context, monkeypatch, who):
    server = create_guarded_socket(context, zmq.ROUTER, "127.0.0.1")
    if who == "no key":
        client = context.socket(zmq.DEALER)
    elif who == "another token":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
        client = create_guarded_socket(context, zmq.DEALER, "127.0.0.1")
    else:
        client = context.socket(zmq.DEALER)
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
        client.curve_serverkey = zmq.curve_keypair()[0]
    assert not exchange(context, server, client)


def test_a_server_without_the_key_gets_nothing(context):
    """This is a neighbour who takes the port after a server has died."""
    client = create_guarded_socket(context, zmq.DEALER, "127.0.0.1")
    assert not exchange(context, context.socket(zmq.ROUTER), client)


def test_within_a_process_nothing_changes(context):
    one, other = (create_guarded_socket(context, zmq.DEALER, "127.0.0.1") for _ in range(2))
    one.bind("inproc://workers")
    other.connect("inproc://workers")
    other.send(b"x")
    assert one.poll(5000)


def test_the_token_is_found_as_ray_finds_it(context, monkeypatch, tmp_path):
    keys = queue._keys()
    assert [len(z85.decode(key)) for key in keys] == [32, 32]
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("a" * 64 + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert queue._keys() == keys
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert create_guarded_socket(context, zmq.ROUTER, "127.0.0.1").getsockopt(zmq.MECHANISM) == zmq.NULL


def test_a_gigabyte_is_sent_in_seconds(context):
    """This is the cost of the key, which also encrypts."""
    server, client = (create_guarded_socket(context, kind, "127.0.0.1") for kind in (zmq.ROUTER, zmq.DEALER))
    assert exchange(context, server, client, 10)
    server.recv_multipart()
    began = time.monotonic()
    client.send(os.urandom(1 << 20) * 64)
    server.recv_multipart()
    assert time.monotonic() - began < 30
