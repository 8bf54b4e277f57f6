"""Tell, join and show addresses of remote files (``https://…``, ``s3://…``).

An address may hold secrets: a user name and password before the host, a signature in the query.
Whatever is printed, logged or stored shows :func:`redact` of it.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from portrait_dist.errors import InputError

_PASSWORD_WITH_SLASH = re.compile(r"(://)[^/?#\s@:\[]*:(?!\d*(?:[/?#\s]|$))\S*@")
"""A password with an unquoted ``/``, ``?`` or ``#``: what follows the colon is no port."""
_USERINFO = re.compile(r"(://)[^/?#\s]*@")
_QUERY_OR_FRAGMENT = re.compile(r"(://[^?#\s]*)[?#]\S*")


def redact(text: str) -> str:
    """Remove user names, passwords, queries and fragments of all addresses in a text.

    Args:
        text: an address, a path, or a message that may hold addresses.

    Returns:
        The text with ``scheme://host/path`` in place of each address; unchanged without ``://``.
    """
    if "://" not in text:
        return text
    if is_address(text):  # all of it is one address, blanks included
        text = "%20".join(text.split(" "))
    text = _PASSWORD_WITH_SLASH.sub(r"\1", text)
    text = _USERINFO.sub(r"\1", text)
    return _QUERY_OR_FRAGMENT.sub(r"\1", text)


def is_address(location: object) -> bool:
    """Whether a location is an address and not a path of a local folder."""
    return (
        re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://", str(location))
        is not None
    )


def check_address(address: str) -> None:
    """Refuse what is no well-formed address.

    Raises:
        InputError: control characters, no host, or a port or IPv6 address that is none.
    """
    try:
        parts = urlsplit(address)
        wrong = (
            "it holds control characters"
            if not address.isprintable()
            else "it has no host"
            if parts.scheme in ("http", "https") and not parts.hostname
            else ""
        )
        _ = parts.port if parts.scheme in ("http", "https") else None
    except ValueError:  # its own message may hold a part of a password
        wrong = "its host or port cannot be read"
    if wrong:
        raise InputError(
            f"{redact(address)!r}: is not an address ({wrong}); write it as https://HOST/FOLDER"
        )


def join(location: str, name: str) -> str:
    """Return the address of a file in a folder; a query, such as a signature, stays at the end."""
    parts = urlsplit(location)
    if parts.scheme not in ("http", "https"):
        return f"{location.rstrip('/')}/{name}"
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
