"""Which addresses of the internet pictures may be fetched from: public unicast, nothing else.

A list of what is refused would need to know every block that reaches back inside: of IPv6 only the
global unicast block passes, without those parts of it that wrap an IPv4 address or route nowhere.
Sources: IANA's special-purpose registries (RFC 6890 and its updates), RFC 6052, 3056, 4380, 8215.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urljoin

_REFUSED_IPV4 = [
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' own; 100.100.100.200 is a cloud's metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's own, though it looks public
        "169.254.0.0/16",  # link-local; 169.254.169.254 is the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation, as the two below
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
_GLOBAL_IPV6 = IPv6Network("2000::/3")  # neither ::1, fc00::/7, fe80::/10, ff00::/8,
# nor IPv4 as ::ffff:0:0/96 or ::/96, nor NAT64's 64:ff9b::/96 and 64:ff9b:1::/48
_REFUSED_IPV6 = [
    IPv6Network(text)
    for text in (
        "2001::/23",  # Teredo 2001::/32, ORCHID and other assignments
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address within
        "2620:4f:8000::/48",
        "3fff::/20",  # documentation
    )
]

_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[a-z0-9](?:[a-z0-9._-]{0,252})|\[[0-9a-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][^\\#]*)?"
    r"(?:#[^\\]*)?",
    re.IGNORECASE,
)
_PRINTABLE = re.compile(r"[!-~]{1,4096}")


@dataclass(frozen=True)
class Address:
    """A URL, taken apart once: what is checked is what is connected to."""

    scheme: str
    host: str
    """lower case; IPv6 without brackets"""
    port: int
    target: str
    """path and query"""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.target}"

    def joined(self, location: str) -> "Address | None":
        """Where a redirect leads; None also if that is nonsense."""
        try:
            return parse_address(urljoin(str(self), location))
        except ValueError:
            return None


def parse_address(url: str) -> Address | None:
    """None for whatever two readers of URLs might read differently.

    Among that are user names, backslashes, blanks, control characters, zones and letters that are
    not ASCII.
    """
    found = _URL.fullmatch(url) if _PRINTABLE.fullmatch(url) else None
    if found is None:
        return None
    scheme = found["scheme"].lower()
    port = int(found["port"] or (443 if scheme == "https" else 80))
    target = found["target"] or "/"
    target = target if target.startswith("/") else f"/{target}"
    host = found["host"].lower().strip("[]").rstrip(".")
    return Address(scheme, host, port, target) if 0 < port < 65536 and host else None


def is_public(text: str) -> bool:
    """Whether a numeric address is one that anybody on the internet could ask."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_IPV4)
    return _is_public_ipv6(address)


def is_within(text: str, networks: tuple[str, ...]) -> bool:
    """Whether a numeric address lies in one of these."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return any(address in ip_network(network) for network in networks)


def _is_public_ipv6(address: IPv6Address) -> bool:
    if address.scope_id is not None or address not in _GLOBAL_IPV6:
        return False
    return not any(address in network for network in _REFUSED_IPV6)
