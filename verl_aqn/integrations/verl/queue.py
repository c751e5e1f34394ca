"""Protection of TransferQueue's sockets: only processes with Ray's token can connect.

These sockets unpickle incoming data, and they listen on loopback or on a node's address, where anybody may connect.
ZeroMQ's protection is CURVE. Here the servers' key is derived from Ray's token, so a process that may not use Ray may
not use the queue either. Without the key, a client's handshake fails and the server drops its messages unread.
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
    """Make TransferQueue create protected sockets in this process and in the actors that it starts."""
    for module in USERS:
        module.create_zmq_socket = create_guarded_socket


def create_guarded_socket(ctx: zmq.Context, socket_type: Any, *arguments: Any, **named: Any) -> zmq.Socket:
    """Create a socket as TransferQueue's `create_zmq_socket` does, but one that requires the key.

    If Ray requires no token (in an existing cluster without one), the queue requires no key.

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
    """Return the public and the secret key that all allowed processes share, or None if Ray requires no token."""
    if not (token := _token()):
        return None
    if not zmq.has("curve"):
        raise EnvironmentFault("this pyzmq has no CURVE, which protects TransferQueue: install pyzmq from PyPI")
    secret = z85.encode(hashlib.sha256(b"verl-aqn TransferQueue " + token).digest())
    return zmq.curve_public(secret), secret


def _token() -> bytes:
    """Return Ray's token, from the place where Ray itself reads it, or b"" if Ray requires none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return b""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip().encode()
    return Path(token_file()).read_bytes().strip()
