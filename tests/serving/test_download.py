"""Hostile URLs and servers against the downloader, on real sockets of 127.0.0.1.

The servers that stand for the internet listen on 127.0.0.1 as well, so a few tests count that one address as public
(``internet``); every other address keeps its own rank. All tests of addresses run with the rule as it is.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import logging
import pickle
import ssl
import time
import traceback
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from dataflow.errors import BadOutputError, ConfigError, RetryError
from dataflow.serving import download
from dataflow.serving.download import Downloader, vet_address, warn_plain_http

pytest.importorskip("aiohttp")

PNG = b"\x89PNG\r\n\x1a\n" + bytes(2000)
METADATA = "169.254.169.254"


# Servers --------------------------------------------------------------------------------------------------------------


class Site:
    """A server that answers each path with given bytes, or however a coroutine does, and records what it was asked."""

    def __init__(self, routes=None, tls=None):
        self.routes, self.tls = routes or {}, tls
        self.connections, self.heads, self.tasks = 0, [], set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def url(self, path, host="127.0.0.1"):
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    async def serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head.decode())
            answer = self.routes.get(head.split()[1].decode(), answer_of(b"", status=404))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (OSError, EOFError):
            pass
        finally:
            writer.transport.abort() if self.tls else writer.close()


def answer_of(body=PNG, *headers, status=200, length=True):
    lines = [f"HTTP/1.1 {status} X", *headers, "Connection: close"]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(target, status=302):
    return answer_of(b"", f"Location: {target}", status=status)


@asynccontextmanager
async def downloader(site, **settings):
    loader = Downloader(engine_url=site.url("/v1"), **{"timeout": 5.0, **settings})
    await loader.open()
    try:
        yield loader
    finally:
        await loader.close()


def fetch(answer, *, path="/x", **settings):
    """What one fetch from the engine's own origin brings if the server answers so."""

    async def main():
        async with Site({"/x": answer}) as site, downloader(site, **settings) as loader:
            return await loader.fetch(path)

    return asyncio.run(main())


def refused(call, reason, *words, error=BadOutputError):
    with pytest.raises(error) as caught:
        call()
    assert caught.value.reason == reason, caught.value
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def names(**table):
    """A resolver that knows these names (dots as double underscores), and notes whom it was asked for."""

    async def resolve(host, _port):
        resolve.asked.append(host)
        answers = table[host.replace(".", "__")]
        return answers.pop(0) if isinstance(answers[0], list) else answers

    resolve.asked = []
    return resolve


@pytest.fixture
def internet(monkeypatch):
    real = vet_address
    monkeypatch.setattr(
        download,
        "vet_address",
        lambda text, host="": ipaddress.ip_address(text) if text == "127.0.0.1" else real(text, host),
    )


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    hosts = [x509.DNSName("*.example.net"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return file


@pytest.fixture
def tls(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


# Addresses ------------------------------------------------------------------------------------------------------------

PUBLIC = [
    "8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111",
    "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1",
]  # fmt: skip

INTERNAL = [
    # this machine
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "::", "::1",
    "::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::127.0.0.1",
    "2002:7f00:1::", "2002:7f00:0001::1",
    "2001:0:7f00:1::f7f7:f7f7", "2001:0:808:808::80ff:fffe", "2001:0:808:808::f7f7:f7f7",
    # this network
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "100.127.255.255",
    "::ffff:10.0.0.1", "::ffff:192.168.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "2002:c0a8:1::1",
    "fc00::1", "fdff::1", "fec0::1", "fe80::1", "fe80::1%eth0", "169.254.0.1",
    # metadata of clouds
    METADATA, "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "fd00:ec2::254", "100.100.100.200",
    "192.0.0.192", "168.63.129.16", "::ffff:168.63.129.16",
    # nobody, or many
    "224.0.0.1", "239.255.255.255", "232.1.1.1", "ff02::1", "ff0e::1", "::ffff:224.0.0.1", "64:ff9b::e000:1",
    "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "2001:db8::1", "100::1",
    "192.88.99.1", "64:ff9b:1::7f00:1", "4000::1", "2002:ffff:ffff::",
]  # fmt: skip

# Not for vet_address, which takes what a resolver gave: as hosts in URLs, the system makes 127.0.0.1 of all of them.
ODD_FORMS = [
    "2130706433", "0x7f000001", "0x7f.1", "127.1", "127.0.1", "0177.0.0.1", "017700000001", "0x7F.0x0.0x0.0x1",
    "127.0.0.1", "127.00.00.01",
]  # fmt: skip


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses(text):
    assert vet_address(text) == ipaddress.ip_address(text)


@pytest.mark.parametrize("text", INTERNAL)
def test_other_addresses(text):
    refused(lambda: vet_address(text), "unsafe_url", text)
    refused(lambda: vet_address(text, "some.host"), "unsafe_url", f"some.host resolves to {text}")


@pytest.mark.parametrize(
    "text", [*sorted(set(ODD_FORMS) - {"127.0.0.1"}), "", "localhost", "1.1.1.1.1", "8.8.8.8\n", "٨.8.8.8"]
)
def test_what_no_resolver_gives_is_no_address(text):
    refused(lambda: vet_address(text), "unsafe_url", "is not an address")


@pytest.mark.parametrize(
    "host",
    [*ODD_FORMS, "①②⑦.⓪.⓪.①", "127。0。0。1", "[::1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]",
     "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]", METADATA, "10.0.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0",
     "0", "localhost"],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_no_address_form_reaches_a_server(host, scheme):
    """With the system's own resolver. A listening server proves that nothing arrived."""

    async def main():
        async with Site({"/x": answer_of()}) as site, Site() as engine, downloader(engine) as loader:
            try:
                await loader.fetch(f"{scheme}://{host}:{site.port}/x?secret=s3cr3t")
            finally:
                assert site.connections == 0

    message = refused(lambda: asyncio.run(main()), "unsafe_url")
    assert "s3cr3t" not in message
    if scheme == "https" and host in ODD_FORMS:
        assert "127.0.0.1" in message


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", METADATA, "10.1.2.3", "fe80::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
)
def test_names_of_internal_addresses(address):
    async def main():
        resolve = names(metadata__google__internal=["8.8.8.8", address])
        async with Site() as engine, downloader(engine, resolve=resolve) as loader:
            await loader.fetch("https://metadata.google.internal/computeMetadata/v1/?a=s3cr3t")

    words = f"metadata.google.internal resolves to {address}"
    assert "s3cr3t" not in refused(lambda: asyncio.run(main()), "unsafe_url", words)


def test_a_name_that_changes_its_mind(internet, tls):
    """Each connection has one look-up, which is vetted: there is no moment between the check and the use."""

    async def main():
        resolve = names(pictures__example__net=[["127.0.0.1"], ["127.0.0.9"]])
        async with (
            Site({"/x": answer_of()}, tls) as site,
            Site() as engine,
            downloader(engine, resolve=resolve) as loader,
        ):
            url = site.url("/x", "pictures.example.net")
            assert await loader.fetch(url) == PNG
            assert resolve.asked == ["pictures.example.net"]
            try:
                await loader.fetch(url)
            finally:
                assert len(resolve.asked) == 2
                assert site.connections == 1

    refused(lambda: asyncio.run(main()), "unsafe_url", "pictures.example.net resolves to 127.0.0.9")


def test_names_nobody_knows(internet):
    async def unknown(host, _port):
        raise OSError("no such name")

    async def empty(host, _port):
        return []

    async def main(resolve, url):
        async with Site() as engine, downloader(engine, resolve=resolve) as loader:
            await loader.fetch(url)

    for resolve in (unknown, empty):
        refused(lambda r=resolve: asyncio.run(main(r, "https://a.example/?k=s3cr3t")), "download", error=RetryError)
    long = "a" * 70 + ".example"
    refused(lambda: asyncio.run(main(None, f"https://{long}/")), "unsafe_url", "is not a host")


# URLs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "file: URLs"),
        ("ftp://example.org/a.png", "ftp: URLs"),
        ("gopher://example.org/", "gopher: URLs"),
        ("javascript:alert(1)", "javascript: URLs"),
        ("DATA:image/png;base64,AAAA", "decode it"),
        (" data:image/png;base64,AAAA", "decode it"),
        ("https://user:s3cr3t@example.org/", "user or a password"),
        ("https://@example.org/", "user or a password"),
        ("https://example.org@127.0.0.1/", "user or a password"),
        ("https://example.org\\@127.0.0.1/", "backslashes"),
        ("https://example.org/\r\nHost: x", "control characters"),
        ("https://exa mple.org/", "blanks"),
        ("", "empty"),
        ("https://", "is not a host"),
        ("https:///x", "is not a host"),
        ("https://127%2e0.0.1/", "is not a host"),
        ("https://[fe80::1%25eth0]/", ""),
        ("https://example.org:99999/", "cannot be read"),
        ("https://[::1/", "cannot be read"),
        ("https://a\ud800.org/", ""),
        ("http://example.org/?k=s3cr3t", "plain http"),
        ("//example.org/a.png", "plain http"),
    ],
)
def test_urls_that_are_not_asked(url, words):
    assert "s3cr3t" not in refused(lambda: fetch(answer_of(), path=url), "unsafe_url", words)


@pytest.mark.parametrize("path", ["/x", "x", "./x", " /x\n", "../../x", "/x#part"])
def test_relative_urls_are_the_engines(path):
    assert fetch(answer_of(), path=path) == PNG


def test_only_the_engines_very_origin_may_be_local(tls):
    async def main():
        async with Site({"/x": answer_of()}) as site, Site({"/x": answer_of()}) as other, downloader(site) as loader:
            assert await loader.fetch(site.url("/x")) == PNG
            assert await loader.fetch(site.url("/x").upper().replace("/X", "/x")) == PNG
            for url in (other.url("/x"), site.url("/x", "localhost"), f"https://127.0.0.1:{site.port}/x"):
                with pytest.raises(BadOutputError) as caught:
                    await loader.fetch(url)
                assert caught.value.reason == "unsafe_url"
            assert (site.connections, other.connections) == (2, 0)
            named = Downloader(engine_url=site.url("/v1", "gpu.lan"), resolve=names(gpu__lan=["127.0.0.1"]))
            await named.open()
            assert await named.fetch("/x") == PNG
            await named.close()
        async with Site({"/x": answer_of()}, tls) as site, downloader(site) as loader:
            assert await loader.fetch(site.url("/x")) == PNG

    asyncio.run(main())


@pytest.mark.parametrize("host", ["pictures.example.net", "127.0.0.1", "127.1", "0x7F000001."])
def test_a_signed_url_arrives_as_it_was_written(internet, tls, host):
    path = "/a%2Fb/%7Ec?X-Sig=a%2Fb%3D+%20c&e=%c3%a9&empty="

    async def main():
        resolve = names(**{host.replace(".", "__"): ["127.0.0.1"]})
        async with (
            Site({path: answer_of()}, tls) as site,
            Site() as engine,
            downloader(engine, resolve=resolve) as loader,
        ):
            assert await loader.fetch(site.url(path, host)) == PNG

    asyncio.run(main())


def test_an_invalid_certificate(internet, tls, monkeypatch):
    async def main(host):
        resolve = names(pictures__example__org=["127.0.0.1"], pictures__example__net=["127.0.0.1"])
        async with (
            Site({"/x": answer_of()}, tls) as site,
            Site() as engine,
            downloader(engine, resolve=resolve) as loader,
        ):
            await loader.fetch(site.url("/x", host))

    words = "certificate of pictures.example"
    refused(lambda: asyncio.run(main("pictures.example.org")), "unsafe_url", words)
    monkeypatch.delenv("SSL_CERT_FILE")
    refused(lambda: asyncio.run(main("pictures.example.net")), "unsafe_url", words)


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://example.org", "/v1", "http://", "http://[::1"])
def test_a_service_without_an_origin(url):
    with pytest.raises(ConfigError, match="http://"):
        Downloader(engine_url=url)


# Redirects and what goes along ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [f"http://{METADATA}/latest/meta-data/?k=s3cr3t", f"https://{METADATA}/?k=s3cr3t", "https://127.0.0.1:1/?k=s3cr3t",
     "https://[::ffff:7f00:1]/?k=s3cr3t", "https://2130706433/?k=s3cr3t", "https://127.0.0.1./", "https://metadata.google.internal/?k=s3cr3t",
     "file:///etc/passwd", "data:image/png;base64,AAAA", "https://a:s3cr3t@example.org/", "//127.0.0.1:1/"],
)  # fmt: skip
def test_redirects_are_vetted(target):
    known = {"metadata.google.internal": METADATA, METADATA: METADATA, "::ffff:7f00:1": "::ffff:7f00:1"}
    known |= dict.fromkeys(("127.0.0.1", "127.0.0.1.", "2130706433"), "127.0.0.1")
    resolve = names(**{host.replace(".", "__"): [address] for host, address in known.items()})
    message = refused(lambda: fetch(redirect(target), resolve=resolve), "unsafe_url")
    assert "s3cr3t" not in message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_three_redirects_and_no_more(status):
    async def main():
        async with Site() as site, downloader(site) as loader:
            site.routes = {f"/{n}": redirect(f"{n - 1}" if n % 2 else f"/{n - 1}", status) for n in range(1, 9)} | {
                "/0": answer_of()
            }
            assert await loader.fetch("/3") == PNG
            site.connections = 0
            try:
                await loader.fetch("/4")
            finally:
                assert site.connections == 4

    refused(lambda: asyncio.run(main()), "bad_redirect", "more than 3 times")


def test_redirects_in_a_circle_and_to_nowhere():
    refused(lambda: fetch(redirect("/x")), "bad_redirect", "more than 3 times")
    refused(lambda: fetch(answer_of(b"", status=302)), "bad_redirect", "nowhere")


def test_the_key_and_cookies_stay_with_the_engine(internet, tls):
    """From the engine by way of the engine elsewhere and back: the key goes as far as the first step off the origin."""

    async def main():
        resolve = names(cdn__example__net=["127.0.0.1"], **{"127__0__0__1": ["127.0.0.1"]})
        async with Site() as engine, Site(tls=tls) as cdn, downloader(engine, resolve=resolve) as loader:
            cookie = "Set-Cookie: session=s3cr3t; Path=/"
            engine.routes = {
                "/a": answer_of(b"", "Location: /b", cookie, status=302),
                "/b": redirect(cdn.url("/c", "cdn.example.net"), 307),
                "/d": answer_of(),
            }
            cdn.routes = {
                "/c": answer_of(b"", f"Location: {engine.url('/d')}", cookie, status=308),
                "/x": answer_of(PNG, cookie),
            }
            assert await loader.fetch("/a", key="s3cr3t") == PNG
            for _ in range(2):
                assert await loader.fetch(cdn.url("/x", "cdn.example.net"), key="s3cr3t") == PNG
            assert await loader.fetch("/d") == PNG
        a, b, *later = engine.heads
        assert all("Authorization: Bearer s3cr3t\r\n" in head and head.count("s3cr3t") == 1 for head in (a, b))
        assert len(later) == 2
        assert len(cdn.heads) == 3
        for head in later + cdn.heads:
            assert "s3cr3t" not in head
            for header in ("authorization", "cookie", "referer"):
                assert header not in head.lower()

    asyncio.run(main())


# Bodies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [PNG, b"\xff\xd8\xff\xe0" + bytes(50), b"RIFF\0\1\0\0WEBPVP8 " + bytes(50)])
def test_pictures_arrive_whole(body):
    assert fetch(answer_of(body)) == body
    assert fetch(answer_of(body, length=False)) == body
    assert fetch(answer_of(body), max_bytes=len(body)) == body
    assert (
        fetch(answer_of(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), "Transfer-Encoding: chunked", length=False))
        == body
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"\x89PNG", b"<html>502", b'{"error": "x"}', b"<svg xmlns='x'/>", b"GIF89a" + bytes(50), b"RIFF\0\0\0\0AVI ",
     b"#!/bin/sh\n", bytes(5000), PNG[1:]],
)  # fmt: skip
def test_what_is_no_picture(body):
    refused(lambda: fetch(answer_of(body, "Content-Type: image/png")), "not_an_image")


def test_what_is_no_picture_is_not_waited_for():
    begun = time.monotonic()
    refused(lambda: fetch(dripping(b"<html>" * 100, 0.05), timeout=60.0), "not_an_image")
    assert time.monotonic() - begun < 4


def test_too_large_by_its_own_words():
    async def main():
        async def answer(writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(60)

        async with Site({"/x": answer}) as site, downloader(site) as loader:
            await loader.fetch("/x")

    begun = time.monotonic()
    refused(lambda: asyncio.run(main()), "too_large", "67,108,864")
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("chunked", [True, False])
def test_too_large_without_saying_so(chunked):
    sent = 0

    async def answer(writer):
        nonlocal sent
        kind = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        writer.write(b"HTTP/1.1 200 OK\r\n" + kind + b"Connection: close\r\n\r\n")
        block = PNG[:8] + bytes(2**16 - 8)
        while True:
            writer.write(b"10000\r\n" + block + b"\r\n" if chunked else block)
            await writer.drain()
            sent += len(block)

    refused(lambda: fetch(answer, max_bytes=2**20), "too_large", "more than 1,048,576 bytes")
    assert sent < 2**24  # the kernel's buffers, not the whole endless body


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d8\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d8\r\n" + PNG + b"\r\n",
    ],
)
def test_a_cut_body(answer):
    refused(lambda: fetch(answer), "cut_body", error=RetryError)


def test_a_reset_in_the_middle():
    async def answer(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + PNG)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.transport.abort()

    refused(lambda: fetch(answer), "cut_body", "2,008 bytes", error=RetryError)


def dripping(block, pause, head=b"HTTP/1.1 200 OK\r\nContent-Length: 60000000\r\n\r\n"):
    async def answer(writer):
        writer.write(head)
        while True:
            writer.write(block)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


@pytest.mark.parametrize(
    ("answer", "words", "within"),
    [
        (dripping(PNG[:20], 0.05), "less than 1,024 bytes a second", 0.3),
        (dripping(PNG, 60), "less than 1,024 bytes a second", 0.5),
        (dripping(b"", 60, b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n"), "less than 1,024 bytes a second", 0.3),
        (dripping(PNG, 0.05), "within 1.2 s", 1.2),
        (dripping(b"x", 0.05, b"HTTP/1.1 200 OK\r\nX: "), "within 1.2 s", 1.2),
        (dripping(b"", 60, b""), "within 1.2 s", 1.2),
    ],
    ids=["drip", "stop", "no body", "slow but sure", "endless head", "silence"],
)
def test_slow_servers(answer, words, within):
    begun = time.monotonic()
    refused(lambda: fetch(answer, timeout=1.2), "download", words, error=RetryError)
    assert time.monotonic() - begun < within + 1


def test_a_body_that_is_slow_but_fast_enough_arrives():
    async def answer(writer):
        writer.write(answer_of(PNG * 5)[: -len(PNG) * 5])
        for start in range(0, len(PNG) * 5, 1000):
            writer.write((PNG * 5)[start : start + 1000])
            await asyncio.sleep(0.05)

    assert fetch(answer, timeout=1.8) == PNG * 5


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate", "zstd", "identity, gzip"])
def test_packed_bodies_are_not_unpacked(encoding):
    bomb = gzip.compress(PNG + bytes(5_000_000))
    refused(lambda: fetch(answer_of(bomb, f"Content-Encoding: {encoding}")), "encoded_body", "asked not to")


def test_nothing_is_unpacked_and_identity_is_asked_for():
    async def main():
        async with Site({"/x": answer_of(PNG, "Content-Encoding: identity")}) as site, downloader(site) as loader:
            assert await loader.fetch("/x") == PNG
            assert "Accept-Encoding: identity\r\n" in site.heads[0]

    asyncio.run(main())
    refused(lambda: fetch(answer_of(gzip.compress(PNG))), "not_an_image")


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (404, BadOutputError, "image_gone"), (410, BadOutputError, "image_gone"), (403, BadOutputError, "image_gone"),
        (401, BadOutputError, "image_gone"), (400, BadOutputError, "image_gone"), (204, BadOutputError, "not_an_image"),
        (206, BadOutputError, "not_an_image"), (304, BadOutputError, "not_an_image"),
        (408, RetryError, "download"), (429, RetryError, "download"), (500, RetryError, "download"),
        (503, RetryError, "download"),
    ],
)  # fmt: skip
def test_statuses(status, error, reason):
    answer = answer_of(b"" if status in (204, 304) else PNG, status=status)
    refused(lambda: fetch(answer), reason, str(status), error=error)


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"])
def test_servers_that_speak_no_http(answer):
    message = refused(lambda: fetch(answer), "download", error=RetryError)
    assert "127.0.0.1" in message


def test_errors_hold_no_secret_anywhere(internet, tls):
    """Neither in the text, nor in what a traceback shows of the cause, nor in a pickle."""
    secret, path = "s3cr3t", "/x?k=s3cr3t"

    async def main():
        resolve = names(pictures__example__net=["127.0.0.1"])
        async with (
            Site({path: b"nonsense\r\n\r\n"}, tls) as site,
            Site() as engine,
            downloader(engine, resolve=resolve) as loader,
        ):
            await loader.fetch(site.url(path, "pictures.example.net"), key=secret)

    with pytest.raises(RetryError) as caught:
        asyncio.run(main())
    assert secret not in "".join(traceback.format_exception(caught.value)).replace('"/x?k=s3cr3t"', "")
    assert secret.encode() not in pickle.dumps(caught.value)


# The object itself ----------------------------------------------------------------------------------------------------


def test_connections_wait_for_each_other_outside_of_the_time_limit():
    now = most = 0

    async def answer(writer):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.2)
        now -= 1
        writer.write(answer_of())
        await writer.drain()

    async def main():
        async with Site({"/x": answer}) as site, downloader(site, connections=2, timeout=0.6) as loader:
            assert set(await asyncio.gather(*(loader.fetch("/x") for _ in range(10)))) == {PNG}

    asyncio.run(main())
    assert most == 2


def test_opening_and_closing():
    async def main():
        loader = Downloader(engine_url="http://127.0.0.1:1/v1")
        with pytest.raises(RuntimeError, match="open"):
            await loader.fetch("/x")
        await loader.close()
        await loader.open()
        await loader.open()
        with pytest.raises(RetryError):
            await loader.fetch("/x")
        await loader.close()
        await loader.close()

    asyncio.run(main())


# Plain http -----------------------------------------------------------------------------------------------------------


def test_plain_http_to_others_warns_once(caplog):
    with caplog.at_level(logging.WARNING):
        for url in (
            "http://api.example.org/v1?k=s3cr3t",
            "http://u:s3cr3t@API.example.org/",
            "http://api.example.org:80",
        ):
            warn_plain_http(url)
        warn_plain_http("http://10.0.0.7:8000/v1")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "api.example.org is asked over plain http" in caplog.messages[0]
    assert "10.0.0.7" in caplog.messages[1]
    assert "s3cr3t" not in caplog.text


def test_plain_http_to_this_machine_is_fine(caplog):
    for host in (
        "localhost",
        "LOCALHOST:80",
        "a.localhost",
        "127.0.0.1:8000",
        "127.9.9.9",
        "[::1]:8000",
        "0.0.0.0:1",
        "",
    ):
        warn_plain_http(f"http://{host}/v1")
    warn_plain_http("https://other.example.org/v1")
    assert not caplog.records
