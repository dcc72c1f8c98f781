"""Connections to public addresses only, each with one deadline for everything that happens on it.

The address that is checked is the one connected to: a name that resolves to another address a moment later
(DNS rebinding) gains nothing. Proxies of the environment are not used, for they would resolve names themselves.
"""

import io
import ipaddress
import socket
import ssl
import time
from typing import Any

_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last four bytes are an IPv4 address
_TLS = ssl.create_default_context()


class PrivateAddressError(OSError):
    """A host whose addresses are all private, loopback, link-local or otherwise not public."""


class Deadline:
    """A moment after which nothing may be waited for.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left.

        Raises:
            TimeoutError: None.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("took too long in all")
        return left


def is_public(address: str) -> bool:
    """Whether a numeric address is a public one of a single host; IPv4 inside IPv6 is judged as IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if found in _NAT64:
            inner.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        inside = [one for one in inner if one is not None]
        if inside:
            return all(is_public(str(one)) for one in inside)
        if found not in _IPV6_UNICAST:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def connect(host: str, port: int, tls: bool, deadline: Deadline, allow_private: bool) -> "TimedSocket":
    """Connects to the first address of a host that answers.

    Raises:
        PrivateAddressError: It has only addresses that are not public.
        OSError: From resolving, connecting or TLS; the last one if there are several.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        address = str(place[0])
        if not allow_private and not is_public(address):
            failure = failure or PrivateAddressError(f"{host} is {address}")
            continue
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(deadline.left())
            plain.connect(place)
            plain.settimeout(deadline.left())
            wrapped = _TLS.wrap_socket(plain, server_hostname=host) if tls else plain
            return TimedSocket(wrapped, deadline)
        except OSError as error:
            plain.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


class TimedSocket:
    """As much of a socket as `http.client` needs; every operation ends at the deadline."""

    def __init__(self, wrapped: socket.socket, deadline: Deadline) -> None:
        self._socket = wrapped
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        """Sends everything."""
        self._socket.settimeout(self._deadline.left())
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """A reader of what comes."""
        return io.BufferedReader(_Reader(self._socket, self._deadline))

    def close(self) -> None:
        """Nothing: `http.client` closes while a response is still to be read; see `shut`."""

    def shut(self) -> None:
        """Closes the connection."""
        self._socket.close()


class _Reader(io.RawIOBase):
    def __init__(self, wrapped: socket.socket, deadline: Deadline) -> None:
        self._socket = wrapped
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._deadline.left())
        return self._socket.recv_into(buffer)
