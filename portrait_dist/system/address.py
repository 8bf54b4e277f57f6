"""Tell, join and show addresses of remote files (``https://…``, ``s3://…``), and lists of them.

An address may hold secrets: a user name and password before the host, a signature in the query.
Whatever is printed, logged or stored shows :func:`redact` of it.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
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


HEAVIEST = 1_000_000
"""Largest weight of a shard set."""
_WEIGHT = re.compile(r"(?P<location>.+):(?P<weight>[0-9]{1,7}(\.[0-9]{0,9})?|\.[0-9]{1,9})")
_PORT_ONLY = re.compile(r"[^/]*://[^/?#]*")


@dataclass(frozen=True)
class WeightedLocation:
    """One shard set of a list.

    Args:
        location: folder or address.
        weight: passes over its samples in an epoch.
    """

    location: str
    weight: Fraction = Fraction(1)

    @property
    def shown(self) -> str:
        """The location without secrets, and its weight where it is not 1."""
        return f"{redact(self.location)}{f':{self.decimal}' if self.weight != 1 else ''}"

    @property
    def decimal(self) -> str:
        """The weight as it is written in a list, all digits, without an exponent."""
        return f"{Decimal(self.weight.numerator) / self.weight.denominator:f}"


def is_one_folder(text: str) -> bool:
    """Whether a text names one folder on a disk, without a weight."""
    return not is_address(text) and read_locations(text)[0].location == text


def read_locations(text: str) -> tuple[WeightedLocation, ...]:
    """Read ``a``, or a list such as ``a:1,b:0.3``; a set without a weight has 1.

    A folder whose own name has a comma or ends like a weight is that folder where it exists. What
    follows the query of an address up to the next address belongs to the query.

    Raises:
        InputError: a set without a name, named twice, or with a weight that is too large or no
            plain number; or all weights are 0.
    """
    # The end of a single address with a query may be a time: ``?until=12:30``.
    if os.path.isdir(text) or (is_address(text) and "," not in text and "?" in text):
        return (WeightedLocation(text),)
    found = [_weighted(part) for part in _parts(text)]
    for number, one in enumerate(found):
        if not one.location:
            raise InputError(f"{redact(text)!r}: a shard set has no name; write a:1,b:0.3")
        if one.weight > HEAVIEST:
            raise InputError(f"{one.shown}: a weight is from 0 to {HEAVIEST:,}")
        if one.location.rstrip("/") in (other.location.rstrip("/") for other in found[:number]):
            raise InputError(
                f"{redact(one.location)}: named twice in the list of shard sets; "
                "give it once, with the sum of both weights"
            )
    if not any(one.weight for one in found):
        raise InputError(f"{redact(text)}: all weights are 0; give one shard set a larger one")
    return tuple(found)


def _parts(text: str) -> list[str]:
    parts: list[str] = []
    for part in text.split(","):
        if parts and is_address(parts[-1]) and "?" in parts[-1] and not is_address(part):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _weighted(part: str) -> WeightedLocation:
    found = _WEIGHT.fullmatch(part)
    # The number behind a host is its port.
    if os.path.isdir(part) or _PORT_ONLY.fullmatch(part):
        return WeightedLocation(part)
    if not found:
        _refuse_odd_weight(part)
        return WeightedLocation(part)
    return WeightedLocation(found["location"], Fraction(found["weight"]))


def _refuse_odd_weight(part: str) -> None:
    """Refuse -1, nan, 1e-3 and other numbers behind the colon that are no weights."""
    _, colon, end = part.rpartition(":")
    with contextlib.suppress(ValueError):
        float(end if colon else "")
        raise InputError(
            f"{redact(part)}: a weight is from 0 to {HEAVIEST:,}, such as 0.3, with 9 decimals at "
            "most and no exponent"
        )


def any_address(text: str) -> bool:
    """Whether one of the shard sets in a list is at an address."""
    return any(is_address(one.location) for one in read_locations(text))


_MEMBERS = re.compile(r"#((?:image|mask)=[^#+]+(?:\+(?:image|mask)=[^#+]+)*)$")


def split_members(location: str) -> tuple[str, dict[str, str]]:
    """Split ``tars#image=jpg+mask=seg.png`` into the path and what names the members."""
    found = _MEMBERS.search(location)
    if is_address(location) or not found:
        return location, {}
    pairs = (part.partition("=") for part in found[1].split("+"))
    return location[: found.start()], {name: value for name, _, value in pairs}
