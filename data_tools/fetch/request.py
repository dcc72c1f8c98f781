"""One picture by HTTP: redirects, limits, and a reason for whatever goes wrong."""

import errno
import http.client
import re
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from data_tools import TOOL_VERSION
from data_tools.fetch.address import Deadline, PrivateAddressError, TimedSocket, connect

MAX_REDIRECTS = 5
TRANSIENT = frozenset(
    (
        *("timeout", "connection_error", "dns_error", "cut_body", "bad_response"),
        *(f"http_{status}" for status in (408, 425, 429, 500, 502, 503, 504)),
    )
)
"""Reasons worth another try."""

REASONS = {
    "bad_url": "not a URL, or one that names no file",
    "bad_scheme": "neither http nor https",
    "duplicate_name": "another link of the table has the same file name",
    "dns_error": "no such host, or no answer about it",
    "private_address": "the host, or one it leads to, is not in the public network",
    "connection_error": "refused, reset, unreachable",
    "tls_error": "no valid certificate or no common protocol",
    "timeout": "not finished within the time",
    "bad_response": "not HTTP, or encoded in a way not asked for",
    "http_<status>": "the server's answer, such as http_404",
    "redirect_loop": "leads back to where it came from",
    "too_many_redirects": f"more than {MAX_REDIRECTS}",
    "opted_out": "X-Robots-Tag forbids indexing or training",
    "not_an_image": "does not begin like a picture, such as an HTML page, whatever its type says",
    "too_large": "more than --max-mib",
    "empty_body": "no bytes",
    "cut_body": "fewer bytes than announced",
}
"""Why a link fails."""

_REDIRECTS = (301, 302, 303, 307, 308)
_OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_MAGIC_BYTES = 12
_BLOCK = 1 << 16
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)  # faults of ours, not of a link
_NO_HOST = re.compile("[\0- \x7f]")
_SAFE = "%/:=&?~+!$,;'@()*[]"


class FetchError(Exception):
    """A link that gives no picture.

    Args:
        reason: Key of `REASONS`.
        detail: More about it.
        wait: Seconds the server asks to wait.
    """

    def __init__(self, reason: str, detail: str = "", wait: float = 0) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.wait = wait


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        timeout: Seconds, redirects included.
        max_bytes: Of a body.
        allow_private: Whether addresses that are not public may be connected to.
        user_agent: What we call ourselves.
    """

    timeout: float = 20.0
    max_bytes: int = 32 << 20
    allow_private: bool = False
    user_agent: str = f"mt-data/{TOOL_VERSION}"


class _Connection(http.client.HTTPConnection):
    def __init__(self, url: SplitResult, limits: Limits, deadline: Deadline) -> None:
        tls = url.scheme == "https"
        self.default_port = 443 if tls else 80  # type: ignore[misc]
        super().__init__(url.hostname or "", url.port or self.default_port)
        self._open = lambda: connect(self.host, self.port, tls, deadline, limits.allow_private)
        self.opened: TimedSocket | None = None

    def connect(self) -> None:
        self.opened = self._open()
        self.sock = self.opened  # type: ignore[assignment]


def host_of(url: str) -> str:
    """The host a link names, for politeness; empty if it names none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def download(url: str, limits: Limits) -> bytes:
    """The body a link leads to, which begins like a picture.

    Raises:
        FetchError: With the reason.
        OSError: A fault of this machine, such as too many open files.
    """
    deadline = Deadline(limits.timeout)
    seen: set[str] = set()
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        address = parts.geturl()
        if address in seen:
            raise FetchError("redirect_loop", address)
        seen.add(address)
        found = _request(parts, limits, deadline)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(address, found)
        except ValueError as error:
            raise FetchError("bad_url", f"{found}: {error}") from error
    raise FetchError("too_many_redirects", url)


def _split(url: str) -> SplitResult:
    """The parts of a URL, quoted, without fragment."""
    try:
        parts = urlsplit(url.strip())
        if not parts.scheme or parts.scheme in ("http", "https"):
            host = parts.hostname or ""
            host.encode("idna")
            if not parts.scheme or not host or _NO_HOST.search(host) or parts.port == 0:
                raise FetchError("bad_url", url)
            path, query = quote(parts.path or "/", _SAFE), quote(parts.query, _SAFE)
            return parts._replace(path=path, query=query, fragment="")
    except (ValueError, UnicodeError) as error:
        raise FetchError("bad_url", f"{url}: {error}") from error
    raise FetchError("bad_scheme", url)


def _request(url: SplitResult, limits: Limits, deadline: Deadline) -> bytes | str:
    """The body, or where the server sends us."""
    connection = _Connection(url, limits, deadline)
    try:
        target = url.path + (f"?{url.query}" if url.query else "")
        headers = {
            "User-Agent": limits.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            return _answer(response, limits)
    except PrivateAddressError as error:
        raise FetchError("private_address", str(error)) from error
    except TimeoutError as error:
        raise FetchError("timeout", str(error)) from error
    except socket.gaierror as error:
        raise FetchError("dns_error", str(error)) from error
    except ssl.SSLError as error:
        raise FetchError("tls_error", str(error)) from error
    except http.client.IncompleteRead as error:
        raise FetchError("cut_body", str(error)) from error
    except (http.client.HTTPException, ValueError) as error:  # ValueError: lengths that are no numbers
        raise FetchError("bad_response", f"{type(error).__name__}: {error}") from error
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise FetchError("connection_error", str(error)) from error
    finally:
        if connection.opened is not None:
            connection.opened.shut()


def _answer(response: http.client.HTTPResponse, limits: Limits) -> bytes | str:
    location = response.getheader("Location")
    if response.status in _REDIRECTS and location:
        return location.encode("latin-1", "replace").decode("utf-8", "replace")
    if response.status != http.client.OK:
        wait = response.getheader("Retry-After") or ""
        raise FetchError(f"http_{response.status}", response.reason, float(wait) if wait.isdecimal() else 0)
    for value in response.headers.get_all("X-Robots-Tag", []):
        if {one.strip().lower() for one in value.split(",")} & _OPT_OUT:
            raise FetchError("opted_out", value)
    if response.getheader("Content-Encoding", "identity").strip().lower() != "identity":
        raise FetchError("bad_response", f"content encoding {response.getheader('Content-Encoding')}")
    return _body(response, limits)


def _body(response: http.client.HTTPResponse, limits: Limits) -> bytes:
    length: int | None = response.length
    if length is not None and length > limits.max_bytes:
        raise FetchError("too_large", f"{length} bytes announced")
    data = bytearray()
    while length is None or len(data) < length:
        block = response.read1(_BLOCK if length is None else min(_BLOCK, length - len(data)))
        if not block:
            break
        data += block
        if len(data) >= _MAGIC_BYTES:
            _check_start(data, response)
        if len(data) > limits.max_bytes:
            raise FetchError("too_large", f"more than {limits.max_bytes} bytes")
    if length is not None and len(data) < length:
        raise FetchError("cut_body", f"{len(data)} of {length} bytes")
    if not data:
        raise FetchError("empty_body")
    _check_start(data, response)
    return bytes(data)


def _check_start(data: bytearray, response: http.client.HTTPResponse) -> None:
    if not (data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        kind = response.getheader("Content-Type")
        raise FetchError("not_an_image", f"begins with {bytes(data[:16])!r}, type {kind}")
