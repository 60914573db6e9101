"""Which URLs are taken apart, and which numbers may be connected to."""

import pytest

from service.addresses import is_public, is_within, parse_address


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://example.org", ("http", "example.org", 80, "/")),
        ("HTTPS://Example.ORG:8443/a/b.png?x=1&y=%20", ("https", "example.org", 8443, None)),
        ("https://example.org?x", ("https", "example.org", 443, "/?x")),
        ("https://example.org./a#b@c", ("https", "example.org", 443, "/a")),
        ("http://[2001:DB8::1]:80/", ("http", "2001:db8::1", 80, "/")),
        ("http://93.184.216.34/a", ("http", "93.184.216.34", 80, "/a")),
    ],
)
def test_a_url_is_taken_apart(url, parts):
    address = parse_address(url)
    assert address is not None
    target = parts[3] or "/a/b.png?x=1&y=%20"
    assert (address.scheme, address.host, address.port, address.target) == (*parts[:3], target)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org/a.png",
        "//example.org/a.png",
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "data:image/png;base64,AAAA",
        "http:/example.org/",
        "http:example.org",
        "http:///a.png",
        "http://user@example.org/",
        "http://user:secret@example.org/",
        "http://example.org@127.0.0.1/",
        "http://127.0.0.1\\@example.org/",  # CVE-2026-24779: two parsers, two hosts
        "http://example.org\\.internal/",
        "http:\\\\example.org\\a",
        "http://example.org/a\\b",
        "http://example.org#@127.0.0.1/\\",
        " http://example.org/",
        "http://example.org/a b",
        "http://example.org/\t",
        "http://example.org/\r\nHost: internal",
        "http://exa\nmple.org/",
        "http://example.org:0/",
        "http://example.org:65536/",
        "http://example.org:80a/",
        "http://example.org:+80/",
        "http://[::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[::1/",
        "http://::1/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://ex\u00e4mple.org/",
        "http://example.org/\u00e4",
        "http://%31%32%37.0.0.1/",
        "http://-example.org/",
        "http://./",
        "http://" + "a" * 300 + ".org/",
        "http://example.org/" + "a" * 5000,
    ],
)
def test_what_two_readers_might_read_differently_is_no_address(url):
    assert parse_address(url) is None


@pytest.mark.parametrize(
    ("location", "where"),
    [
        ("/b.png", "http://example.org:80/b.png"),
        ("c.png", "http://example.org:80/x/c.png"),
        ("https://other.org/d", "https://other.org:443/d"),
        ("//other.org/d", "http://other.org:80/d"),
        ("file:///etc/passwd", None),
        ("http://user@other.org/", None),
        ("\\\\other.org", None),
        ("http://[", None),
        ("http://[::1", None),
        ("//[x]/", None),
    ],
)
def test_a_redirect_is_read_as_strictly(location, where):
    base = parse_address("http://example.org/x/a.png")
    assert base is not None
    target = base.joined(location)
    assert (None if target is None else str(target)) == where


@pytest.mark.parametrize(
    "number",
    ["93.184.216.34", "8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"],
)
def test_a_public_number_may_be_asked(number):
    assert is_public(number)


@pytest.mark.parametrize(
    "number",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",  # metadata
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",  # metadata
        "169.254.169.254",  # metadata
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.0.192",  # metadata
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",  # Teredo
        "2001:20::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",  # metadata
        "fe80::1",
        "fe80::1%lo",
        "2606:4700::1%lo",
        "fec0::1",
        "ff02::1",
        "nonsense",
        "",
    ],
)
def test_any_other_number_may_not(number):
    assert not is_public(number)


def test_a_network_may_be_allowed_by_name():
    assert is_within("127.0.0.1", ("127.0.0.0/8",))
    assert not is_within("128.0.0.1", ("127.0.0.0/8", "::1/128"))
    assert not is_within("nonsense", ("127.0.0.0/8",))
