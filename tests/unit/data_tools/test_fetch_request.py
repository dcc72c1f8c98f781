"""One download: what it takes, and the reason for whatever it does not."""

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.fetch import address
from data_tools.fetch.address import is_public
from data_tools.fetch.request import REASONS, FetchError, Limits, download
from tests.helpers.picture_server import PNG, PictureServer, serving

LIMITS = Limits(timeout=60, max_bytes=1 << 20, allow_private=True)


@pytest.fixture(scope="module")
def server() -> Iterator[PictureServer]:
    with serving() as found:
        yield found


def fault(url: str, limits: Limits = LIMITS) -> str:
    with pytest.raises(FetchError) as caught:
        download(url, limits)
    reason = caught.value.reason
    assert reason in REASONS or (reason.startswith("http_") and reason[5:].isdigit())
    return reason


@pytest.mark.parametrize(
    "path", ["ok/1", "ok/a b?c=d e&f=ü", "mislabelled/", "chunks/", "moved/", "otherbot/"]
)
def test_pictures(path: str, server: PictureServer) -> None:
    assert download(f"  {server.url(path)}#part ", LIMITS) == PNG


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("404/", "http_404"),
        ("403/", "http_403"),
        ("500/", "http_500"),
        ("204/", "http_204"),
        ("206/", "http_206"),
        ("nowhere/", "http_302"),
        ("html/", "not_an_image"),
        ("empty/", "empty_body"),
        ("cut/", "cut_body"),
        ("cutchunk/", "cut_body"),
        ("endless/", "too_large"),
        ("announced/", "too_large"),
        ("garbage/", "bad_response"),
        ("badlength/", "cut_body"),
        ("manyheaders/", "bad_response"),
        ("gzip/", "bad_response"),
        ("noai/", "opted_out"),
        ("loop/", "redirect_loop"),
        ("chain/", "too_many_redirects"),
        ("tofile/", "bad_scheme"),
        ("tobad/", "bad_url"),
    ],
)
def test_reasons(path: str, reason: str, server: PictureServer) -> None:
    assert fault(server.url(path)) == reason


@pytest.mark.parametrize("path", ["silent/", "drip/", "dripbody/", "continue/"])
def test_one_deadline_for_everything(path: str, server: PictureServer) -> None:
    assert fault(server.url(path), Limits(0.3, 1 << 20, True)) == "timeout"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"),
        ("no url", "bad_url"),
        ("//host/x.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http:///x.jpg", "bad_url"),
        ("http://a b/", "bad_url"),
        ("http://a\tb:x/", "bad_url"),
        ("http://host:99999/", "bad_url"),
        ("http://host:0/", "bad_url"),
        ("http://" + "x" * 70 + ".org/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("ftp://127.0.0.1/x.jpg", "bad_scheme"),
        ("file:///etc/passwd", "bad_scheme"),
        ("javascript:x", "bad_scheme"),
        ("data:image/png;base64,AA==", "bad_scheme"),
    ],
)
def test_urls_that_are_not_asked_for(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    assert fault(url) == reason


def test_no_connection(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert fault(f"http://127.0.0.1:{port}/") == "connection_error"
    assert fault(server.url("ok/").replace("http:", "https:")) == "tls_error"

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert fault("http://nowhere.invalid/x.jpg") == "dns_error"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "127.0.0.1",
            "127.8.9.10",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
        ),
        *("100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "fec0::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("64:ff9b:1::808:808", "2002:7f00:1::", "2002:a00:1::1"),
    ],
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(text)


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(text: str) -> None:
    assert is_public(text)


PUBLIC_ONLY = Limits(timeout=60, max_bytes=1 << 20)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "0x7f.1", "127.1"])
def test_private_hosts(host: str, server: PictureServer) -> None:
    before = sum(server.asked.values())
    assert fault(server.url("ok/", host), PUBLIC_ONLY) == "private_address"
    assert sum(server.asked.values()) == before


def only_first_is_public(text: str) -> bool:
    return text == "127.0.0.1"


def test_redirects_to_private_addresses(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's address counts as public here, any other does not."""
    monkeypatch.setattr(address, "is_public", only_first_is_public)
    assert download(server.url("ok/"), PUBLIC_ONLY) == PNG
    assert download(server.url("elsewhere/127.0.0.1"), PUBLIC_ONLY) == PNG
    before = server.asked["/ok/elsewhere"]
    for host in ("127.0.0.2", "169.254.169.254", "[::1]"):
        assert fault(server.url(f"elsewhere/{host}"), PUBLIC_ONLY) == "private_address"
    assert server.asked["/ok/elsewhere"] == before


def test_names_that_change_their_address(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one connected to, however often the name is asked for."""
    asked: list[str] = []
    connected: list[Any] = []
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")

    def rebinding(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(*kind, ("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port))]

    class Spy(socket.socket):
        def connect(self, place: Any) -> None:
            connected.append(place[0])
            super().connect(place)

    monkeypatch.setattr(address, "is_public", only_first_is_public)
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket, "socket", Spy)
    assert download(server.url("ok/", "pictures.example"), PUBLIC_ONLY) == PNG
    assert (asked, connected) == (["pictures.example"], ["127.0.0.1"])
    assert fault(server.url("ok/", "pictures.example"), PUBLIC_ONLY) == "private_address"
    assert connected == ["127.0.0.1"]


def test_private_ones_among_several_addresses(server: PictureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")

    def several(host: str, port: int, **_: Any) -> list[Any]:
        return [(*kind, (one, port)) for one in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(address, "is_public", only_first_is_public)
    monkeypatch.setattr(socket, "getaddrinfo", several)
    assert download(server.url("ok/", "pictures.example"), PUBLIC_ONLY) == PNG


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate must be of the name in the link, whatever the address."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving() as own:
        own.socket = context.wrap_socket(own.socket, server_side=True)
        secure = {
            host: own.url("ok/", host).replace("http:", "https:") for host in ("localhost", "127.0.0.1")
        }
        assert fault(secure["localhost"]) == "tls_error"  # signed by nobody we know
        monkeypatch.setattr(address, "_TLS", ssl.create_default_context(cafile=str(certificate)))
        assert download(secure["localhost"], LIMITS) == PNG
        assert fault(secure["127.0.0.1"]) == "tls_error"
        endless = own.url("endless/", "localhost").replace("http:", "https:")
        assert fault(endless) == "too_large"


def test_faults_of_the_machine_are_not_those_of_a_link(
    server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", full)
    with pytest.raises(OSError, match="Too many open files"):
        download(server.url("ok/"), LIMITS)
