"""The network interface that a trial's ranks talk through, where the host name would lead them astray."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping

SIOCGIFADDR = 0x8915
"""Linux: ask for an interface's IPv4 address (man 7 netdevice)."""
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has an IPv4 address; None if none has, or the system does not tell."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except (ImportError, OSError):
        return None
    return None


def hostname_is_loopback() -> bool:
    """Whether this machine's name resolves to itself only, or not at all: gloo then listens where no other machine can reach it."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return True


def interface_settings(*, address: str, environment: Mapping[str, str] = os.environ, misleading: bool | None = None) -> dict[str, str]:
    """Variables that make gloo and NCCL use the interface of an address; empty where the name is right or somebody has chosen.

    Gloo and NCCL look for the address of the host name, which many systems map to 127.0.1.1
    (https://github.com/ray-project/ray/issues/37461).

    Args:
        address: this machine's address in the cluster.
        environment: of the process.
        misleading: whether the host name resolves to the loopback interface; None: look.
    """
    missing = [name for name in VARIABLES if not environment.get(name)]
    if not missing or address.startswith("127."):
        return {}
    if not (hostname_is_loopback() if misleading is None else misleading):
        return {}
    name = interface_of(address)
    return dict.fromkeys(missing, name) if name else {}
