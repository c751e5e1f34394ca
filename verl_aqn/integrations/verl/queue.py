"""TransferQueue's sockets, which unpickle what comes in, speak only with processes that have Ray's token.

They listen on loopback, or on a node's address, where anybody may connect. ZeroMQ's own means against that is CURVE:
here the servers' key is made from the token that Ray asks for: who may not speak with Ray may not with the queue
either. Without the key a client cannot even greet a server: what it sends is dropped before it is looked at.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import zmq
from transfer_queue import controller
from transfer_queue.storage import simple_storage
from transfer_queue.storage.managers import base
from transfer_queue.utils import zmq_utils
from zmq.utils import z85

from verl_aqn.cluster.start import token_file
from verl_aqn.errors import EnvironmentFault

USERS = (zmq_utils, controller, simple_storage, base)  # modules that make sockets by TransferQueue's function
_create = zmq_utils.create_zmq_socket


def guard() -> None:
    """Have TransferQueue make guarded sockets in this process, and in the actors that it starts."""
    for module in USERS:
        module.create_zmq_socket = create_guarded_socket


def create_guarded_socket(ctx: zmq.Context, socket_type: Any, *arguments: Any, **named: Any) -> zmq.Socket:
    """TransferQueue's `create_zmq_socket` for a socket that takes and gives nothing without the key.

    Where Ray asks for no token, in a cluster that others started so, the queue asks for no key.

    Raises:
        EnvironmentFault: ZeroMQ was built without CURVE.
    """
    socket = _create(ctx, socket_type, *arguments, **named)
    if (keys := _keys()) is None:
        return socket
    public, socket.curve_secretkey = keys
    if socket_type == zmq.ROUTER:
        socket.curve_server = 1
    else:
        socket.curve_publickey, socket.curve_serverkey = public, public
    return socket


def _keys() -> tuple[bytes, bytes] | None:
    """The public and the secret key of all that may speak: None where Ray asks for no token."""
    if not (token := _token()):
        return None
    if not zmq.has("curve"):
        raise EnvironmentFault("this pyzmq has no CURVE, which guards TransferQueue: install pyzmq from PyPI")
    secret = z85.encode(hashlib.sha256(b"verl-aqn TransferQueue " + token).digest())
    return zmq.curve_public(secret), secret


def _token() -> bytes:
    """Ray's token, as Ray itself finds it; b"" where it asks for none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return b""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip().encode()
    return Path(token_file()).read_bytes().strip()
