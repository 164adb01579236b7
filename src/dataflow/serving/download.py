"""Fetch the image whose URL a model's answer names.

Anybody may have influenced the answer, so the URL may lead to the machine's own services, to a cloud's metadata server
or to an endless body. Whether what comes is one whole, harmless picture is for :mod:`dataflow.decoding` to say.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urljoin, urlsplit

from dataflow.errors import BadOutputError, ConfigError, MissingExtraError, RetryError

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import ResolveResult
    from yarl import URL

    Sessions = tuple[aiohttp.ClientSession, aiohttp.ClientSession]

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]
MAX_REDIRECTS = 3
MIN_RATE = 1024
"""Bytes a second below which a body is given up, measured over every sixth of the time limit (10 s of 60)."""

_HEADERS = {"Accept": "image/png, image/jpeg, image/webp", "Accept-Encoding": "identity", "User-Agent": "open-dataflow"}
_NUMBER = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.IGNORECASE)

_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
# Not the internet, whatever ipaddress says of them: an assignment of the IETF with a cloud's metadata in it, dead
# relays to 6to4, and the address at which Azure's host answers its guests.
_INTERNAL = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"), IPv4Network("168.63.129.16/32"))


def vet_address(text: str, host: str = "") -> IPv4Address | IPv6Address:
    """The address, if it is one of the public internet.

    Args:
        text: a resolved address as the system's resolver writes it; short, decimal or octal forms are none.
        host: the name it was found for, for the message.

    Raises:
        BadOutputError: ``unsafe_url``; it is no address, or it, or the IPv4 address that an IPv6 address stands for
            (mapped, 6to4, NAT64), is local, private, reserved or for many receivers. Teredo is refused as a whole.
    """
    found = f"{host} resolves to {text}, which" if host and host != text else text
    try:
        address = ip_address(text)
    except ValueError:
        _refuse(f"{found} is not an address")
    if not _is_public(_destination(address)):
        _refuse(f"{found} is not an address of the public internet; it is not asked")
    return address


def _destination(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Where packets to this address end up: the IPv4 address that a tunnel or translator takes out of it, or itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, IPv6Address):
        # Also without ::127.0.0.1 and fec0::1, long abolished, which count as global in Python; Teredo does not.
        return address in _UNICAST
    return not any(address in network for network in _INTERNAL)


def warn_plain_http(url: str) -> None:
    """Log a warning, once per host, if a service is asked over plain http and is not on this machine.

    Args:
        url: the base URL of an API.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    local = host == "localhost" or host.endswith(".localhost")
    with suppress(ValueError):
        address = ip_address(host)
        local = address.is_loopback or address.is_unspecified
    if parts.scheme == "http" and host and not local:
        _warn_of(host)


@functools.cache
def _warn_of(host: str) -> None:
    log.warning("%s is asked over plain http: everybody on the way can read the key, prompts and images", host)


class Downloader:
    """Fetches images over https from public addresses, and from the service itself at whatever address it has.

    Names are resolved when a connection is made, all their addresses are vetted, and it goes to one of those: there is
    no second look-up that could give another answer. Proxies of the environment are not used.

    Args:
        engine_url: the base URL of the service whose answers are read. Its scheme, host and port, exactly, may be asked
            over plain http and at a private address, and relative URLs are paths there.
        max_bytes: the largest body.
        timeout: seconds for one fetch, redirects included; waiting for one of the ``connections`` does not count. A
            body that brings less than ``MIN_RATE`` over a sixth of it is given up earlier.
        connections: fetches at a time; the others wait.
        resolve: from a host and a port to its addresses, or an OSError; the system's resolver if None.

    Raises:
        ConfigError: ``engine_url`` is not an http or https URL (``MissingExtraError``: aiohttp is not installed).
    """

    def __init__(
        self,
        *,
        engine_url: str,
        max_bytes: int = 64 * 2**20,
        timeout: float = 60.0,
        connections: int = 32,
        resolve: Resolve | None = None,
    ) -> None:
        try:
            import aiohttp  # noqa: F401 - better missed now than after the first paid answer
            from yarl import URL
        except ImportError as error:
            raise MissingExtraError("aiohttp", "api", "fetching images by URL") from error
        try:
            origin = URL(engine_url).origin()
        except ValueError:
            origin = URL()
        if origin.scheme not in ("http", "https"):
            # Without the URL: it may hold a password.
            raise ConfigError("the base URL of the service must begin with http:// or https:// and name a host")
        self._base, self._engine = f"{origin}/", _origin(origin)
        self._max_bytes, self._timeout, self._connections = max_bytes, timeout, connections
        self._resolve = resolve or _ask_system
        self._sessions: Sessions | None = None

    async def open(self) -> None:
        """Get ready to fetch, on the running event loop. Opening twice does no harm."""
        if self._sessions is None:
            trust = ssl.create_default_context()
            self._slots = asyncio.Semaphore(self._connections)
            self._sessions = _session(self._resolve, trust, vet=False), _session(self._resolve, trust, vet=True)

    async def close(self) -> None:
        """Close all connections. Closing twice, or without having opened, does no harm."""
        sessions, self._sessions = self._sessions or (), None
        for session in sessions:
            await session.close()

    async def fetch(self, url: str, *, key: str | None = None) -> bytes:
        """The bytes that a URL leads to.

        Args:
            url: as the answer has it; relative to the service's origin, if it is relative.
            key: a bearer token, sent to the service's own origin only; from the first redirect elsewhere on, to nobody.

        Returns:
            1 to ``max_bytes`` bytes that begin like a PNG, JPEG or WebP.

        Raises:
            BadOutputError: ``unsafe_url``, ``bad_redirect`` (more than three, or to nowhere), ``image_gone`` (the
                server does not have it, or not for us), ``too_large``, ``encoded_body`` or ``not_an_image``.
            RetryError: ``download`` (network, time, 408, 425, 429 or 5xx) or ``cut_body`` (it ended too early).
        """
        if self._sessions is None:
            raise RuntimeError("open() comes before fetch()")
        async with self._slots:
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._follow(_parse(url, self._base), key, self._sessions)
            except TimeoutError:
                _again(f"the image did not come within {self._timeout:g} s")

    async def _follow(self, url: URL, key: str | None, sessions: Sessions) -> bytes:
        import aiohttp

        for _ in range(1 + MAX_REDIRECTS):
            session = sessions[0]
            if _origin(url) != self._engine:
                key, session = None, sessions[1]
                url = await self._vet(url)
            headers = _HEADERS | ({"Authorization": f"Bearer {key}"} if key else {})
            host = url.raw_host or ""
            # No cause is kept below, its text may hold the whole URL, whose query may be as good as a password.
            try:
                async with session.get(url, headers=headers, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await self._read(response, host)
                    target = response.headers.get("Location", "")
                    if not target:
                        _refuse(f"{host} redirects to nowhere", "bad_redirect")
                    url = _parse(target, str(url))
            except aiohttp.ClientConnectorCertificateError:
                _refuse(f"the certificate of {host} is not valid")
            except (aiohttp.InvalidURL, UnicodeError):
                _refuse(f"{host} is not a host")
            except (aiohttp.ClientError, OSError) as error:
                _again(f"{host} could not be asked: {type(error).__name__}")
        raise BadOutputError(f"redirected more than {MAX_REDIRECTS} times, last to {url.host}", reason="bad_redirect")

    async def _vet(self, url: URL) -> URL:
        """A URL that leaves the service's origin: checked as far as it can be before a connection is made."""
        host = url.raw_host or ""
        if url.scheme != "https":
            _refuse(f"{host} would be asked over plain http; only https is")
        if ":" not in host and not _NUMBER.fullmatch(host):
            return url
        # The connector takes hosts that are numbers for addresses, without a look at its resolver.
        found = [host]
        with suppress(OSError, UnicodeError):
            found = await self._resolve(host, url.port or 443) or found
        addresses = [vet_address(text, host) for text in found]
        return url.with_host(str(addresses[0]))

    async def _read(self, response: aiohttp.ClientResponse, host: str) -> bytes:
        import aiohttp

        _check_head(response, host, self._max_bytes)
        clock = asyncio.get_running_loop().time
        window = self._timeout / 6
        due, needed = clock() + window, MIN_RATE * window
        body = bytearray()
        while True:
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        chunk = await response.content.readany()
                        if not chunk:
                            break
                        body += chunk
            except aiohttp.ClientError as error:
                _again(f"the image from {host} ended after {len(body):,} bytes: {type(error).__name__}", "cut_body")
            if len(body) > self._max_bytes:
                _refuse(f"{host} sends more than {self._max_bytes:,} bytes", "too_large")
            if len(body) >= 12:
                _check_kind(body, response, host)
            if clock() >= due:
                if len(body) < needed:
                    _again(f"{host} sends less than {MIN_RATE:,} bytes a second")
                due, needed = clock() + window, len(body) + MIN_RATE * window
        _check_kind(body, response, host)
        return bytes(body)


def _check_head(response: aiohttp.ClientResponse, host: str, max_bytes: int) -> None:
    status = response.status
    if status in (408, 425, 429) or status >= 500:
        _again(f"{host} answers {status}")
    if status != 200:
        _refuse(f"{host} answers {status}, not with an image", "image_gone" if status >= 400 else "not_an_image")
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        # A few kilobytes may unpack to gigabytes, and pictures are compressed as they are.
        _refuse(f"{host} sends a body packed as {encoding[:20]!r}, though it was asked not to", "encoded_body")
    if (response.content_length or 0) > max_bytes:
        _refuse(f"{host} sends more than {max_bytes:,} bytes", "too_large")


def _check_kind(body: bytearray, response: aiohttp.ClientResponse, host: str) -> None:
    if body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP"):
        return
    kind = response.headers.get("Content-Type", "")[:60]
    _refuse(f"what {host} sends, as {kind!r}, does not begin like a PNG, JPEG or WebP", "not_an_image")


def _parse(text: str, base: str) -> URL:
    """An absolute http or https URL. All later decisions are about this one object, no other parser has a say."""
    from yarl import URL

    text = text.strip()
    if text[:5].lower() == "data:":
        _refuse("a data: URL holds its bytes itself, there is nothing to fetch; decode it instead")
    if not text or re.search(r"[\x00-\x20\x7f\\]", text):
        _refuse("the image's URL is empty or holds blanks, backslashes or control characters")
    try:
        joined = urljoin(base, text)
        # Signatures are over the text as it is: nothing may be quoted anew.
        url = URL(joined, encoded=joined.isascii())
        scheme, host, _ = _origin(url)
    except ValueError:
        _refuse("the image's URL cannot be read")
    if scheme not in ("http", "https"):
        _refuse(f"{scheme[:20]}: URLs are not fetched, only https is")
    if "@" in url.raw_authority:
        _refuse("the image's URL names a user or a password")
    if len(host) > 253 or not _HOST.fullmatch(host):
        _refuse(f"{host[:80]!r} is not a host")
    return url


def _origin(url: URL) -> tuple[str, str, int | None]:
    return url.scheme, (url.raw_host or "").lower(), url.port


def _session(resolve: Resolve, trust: ssl.SSLContext, *, vet: bool) -> aiohttp.ClientSession:
    import aiohttp
    from aiohttp.abc import AbstractResolver

    class Resolver(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:  # noqa: ARG002
            addresses = [vet_address(text, host) if vet else ip_address(text) for text in await resolve(host, port)]
            if not addresses:
                raise OSError("no address")
            return [_resolved(host, port, address) for address in addresses]

        async def close(self) -> None:
            pass

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=Resolver(), use_dns_cache=False, limit=0, ssl=trust),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(),
        auto_decompress=False,
    )


def _resolved(host: str, port: int, address: IPv4Address | IPv6Address) -> ResolveResult:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return {"hostname": host, "host": str(address), "port": port, "family": family, "proto": 0, "flags": flags}


async def _ask_system(host: str, port: int) -> list[str]:
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


def _refuse(message: str, reason: str = "unsafe_url") -> NoReturn:
    raise BadOutputError(message, reason=reason) from None


def _again(message: str, reason: str = "download") -> NoReturn:
    raise RetryError(message, reason=reason) from None
