"""Who may ask the page for what: names of this machine, a token where others can reach it, no foreign pages.

`guarded` wraps the whole application. Nothing that gradio serves is reached without passing it.
"""

import hmac
import ipaddress
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOCAL = ("localhost", "127.0.0.1")
COOKIE = "wanjax_studio"
LEAST = 16
"""Characters of a token that is given."""
AGE = 7200
"""Seconds that uploads are kept."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""The browser itself refuses whatever would leave this machine."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
FETCHING = ("/gradio_api/file=http:", "/gradio_api/file=https:", "/gradio_api/proxy=", "/proxy=", "/file=http")
"""Addresses by which gradio would fetch something from elsewhere."""

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def is_local(host: str) -> bool:
    """Whether a host to bind to can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_of(host: str, given: str | None) -> str | None:
    """The token that a page wants: what is given, a random one where others can reach the host, else none.

    Raises:
      ValueError: one too short, or with characters that an address cannot hold.
    """
    if given is not None and (len(given) < LEAST or not all(one.isalnum() and one.isascii() or one in "-_"
                                                             for one in given)):  # fmt: skip
        raise ValueError(f"--token: give at least {LEAST} letters, digits, - or _, or leave it away for a random one")
    return given if given is not None or is_local(host) else secrets.token_urlsafe(24)


def names_of(host: str) -> list[str]:
    """Names by which browsers may call the page, for its Host header.

    Bound to every address of the machine it may have any name: there the token, which a browser sends to the name alone
    that it was given for, keeps out pages that have another name point to it.
    """
    if is_local(host):
        return [*LOCAL, host]
    everywhere = host in ("", "0.0.0.0", "::")
    return ["*"] if everywhere else [*LOCAL, host]


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder of this run alone, mode 0700, emptied and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="wanjax-studio-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def uploaded(value: Any, folder: Path) -> Path | None:
    """The path of an upload as gradio hands it over, None for nothing.

    Args:
      value: None or {"path": ...}.
      folder: where uploads are; nothing else is read.

    Raises:
      ValueError: something else.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or "\0" in path:
        raise ValueError("upload: no file came; drop it again")
    found = Path(path).resolve()
    if not found.is_relative_to(folder.resolve()) or not found.is_file():
        raise ValueError("upload: is not here any more; drop it again")
    return found


def tidy(folder: Path, since: float, age: float = AGE) -> None:
    """Removes uploads that are older than `age` seconds, but not what the page itself put there before `since`."""
    for path in folder.rglob("*"):
        with suppress(OSError):  # somebody else removed it meanwhile
            if path.is_file() and since < path.stat().st_mtime < time.time() - age:
                path.unlink()


class Guard:
    """Refuses requests without the token, of foreign pages, and for what would leave the machine.

    Args:
      app: ASGI.
      token: None for none.
    """

    def __init__(self, app: App, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = _refused(scope, headers)
        if refused is None and self.token is not None and not _same(_cookie(headers), self.token):
            asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
            if scope["type"] == "http" and scope["path"] == "/" and _same(asked, self.token):
                cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                return await _answer(send, 303, "", {"location": "/", "set-cookie": cookie} | HEADERS)
            refused = 401, "token: missing or wrong; open the address that the studio printed when it started\n"
        if refused is not None:
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await _answer(send, *refused, HEADERS)

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name.encode() for name in HEADERS}
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in own]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        return await self.app(scope, receive, sent)


def _refused(scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
    """Status and line for a request that nobody may make."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return 403, "origin: this page takes requests from its own address alone\n"
    if scope["path"].startswith(FETCHING):
        return 403, "file: this page fetches nothing from elsewhere\n"
    return None


def _cookie(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


async def _answer(send: Any, status: int, text: str, headers: dict[str, str]) -> None:
    own = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"} | headers
    pairs = [(name.encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text.encode()})


def guarded(app: App, host: str, token: str | None) -> App:
    """An application behind all of this."""
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return TrustedHostMiddleware(Guard(app, token), allowed_hosts=names_of(host), www_redirect=False)
