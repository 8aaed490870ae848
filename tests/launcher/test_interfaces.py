"""The interface that ranks talk through."""

from __future__ import annotations

import socket
import sys

import pytest

from launcher.interfaces import interface_of, interface_settings

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="interfaces are looked up as Linux does")


def own_address() -> str:
    """An address of this machine that others might reach; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route")
        return str(probe.getsockname()[0])


def test_an_address_leads_to_its_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
    name = interface_of(own_address())
    assert name in {known for _, known in socket.if_nameindex()} - {"lo"}


def test_a_misleading_host_name_names_the_interface_unless_somebody_did() -> None:
    address = own_address()
    name = interface_of(address)
    both = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    assert interface_settings(address=address, environment={}, misleading=True) == both
    assert interface_settings(address=address, environment={"NCCL_SOCKET_IFNAME": "ib0"}, misleading=True) == {"GLOO_SOCKET_IFNAME": name}
    assert interface_settings(address=address, environment={}, misleading=False) == {}
    assert interface_settings(address="127.0.0.1", environment={}, misleading=True) == {}, "everything is on this machine"
