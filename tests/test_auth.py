"""Who may come in."""

from __future__ import annotations

import pytest

from claude_proxy.errors import Failure, ProxyError
from claude_proxy.settings import ApiKey
from claude_proxy.web import auth
from claude_proxy.web.auth import ANONYMOUS, Authenticator, Origins, presented_key

KEYS = (ApiKey("alice", "sk-alice-0123456789"), ApiKey("bob", "sk-bob-0123456789"))


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "expected"),
    [
        (None, None, None),
        ("Bearer k", None, "k"),
        ("bearer k", None, "k"),
        ("BEARER k", None, "k"),
        ("  Bearer    k  ", None, "k"),
        (None, "k", "k"),
        (None, " k ", "k"),
        (None, "", ""),
        ("Bearer a", "b", "a"),
        ("Bearer wrong", "right", "wrong"),
        ("Basic dXNlcg==", "b", ""),
        ("Basic dXNlcg==", None, ""),
        ("k", None, ""),
        ("", "b", ""),
        ("Bearer", None, ""),
        ("Bearer ", "b", ""),
        ("Bearer a b", None, "a b"),
    ],
)
def test_the_key_that_a_request_shows(
    authorization: str | None, x_api_key: str | None, expected: str | None
) -> None:
    assert presented_key(authorization, x_api_key) == expected


def test_without_keys_everybody_is_the_same_tenant() -> None:
    authenticator = Authenticator(())
    assert not authenticator.required
    assert authenticator.tenant(None) == authenticator.tenant("whatever") == ANONYMOUS


def test_a_key_is_known_by_its_name() -> None:
    authenticator = Authenticator(KEYS)
    assert authenticator.required
    assert authenticator.tenant("sk-alice-0123456789") == "alice"
    assert authenticator.tenant("sk-bob-0123456789") == "bob"


@pytest.mark.parametrize(
    "key",
    [
        "sk-alice",
        "sk-alice-01234567890",
        "SK-ALICE-0123456789",
        " sk-alice-0123456789",
        "sk-alice-0123456789\0",
        "alice",
        "\N{GRINNING FACE}",
        "\udcff\udcfe",
    ],
)
def test_any_other_key_is_incorrect(key: str) -> None:
    with pytest.raises(ProxyError) as caught:
        Authenticator(KEYS).tenant(key)
    assert caught.value.failure is Failure.INVALID_API_KEY
    assert caught.value.message.startswith("Incorrect API key provided.")
    assert key not in caught.value.message


@pytest.mark.parametrize("key", [None, ""])
def test_a_missing_key_is_said_to_be_missing(key: str | None) -> None:
    with pytest.raises(ProxyError) as caught:
        Authenticator(KEYS).tenant(key)
    assert caught.value.failure is Failure.INVALID_API_KEY
    assert caught.value.message.startswith("Incorrect API key provided.")
    assert "No key was sent" in caught.value.message


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(auth, "compare_digest", compare)
    assert Authenticator(KEYS).tenant("sk-alice-0123456789") == "alice"
    # A key that matches early must not end the search, or its place would show in the time.
    assert compared == [(key.secret.encode(), b"sk-alice-0123456789") for key in KEYS]


def test_the_comparison_is_the_one_of_the_standard_library() -> None:
    from hmac import compare_digest  # noqa: PLC0415 - for this comparison only

    assert vars(auth)["compare_digest"] is compare_digest


# Web pages.

OPEN = Origins(
    allowed=("https://app.example", "http://localhost:5173"), hosts=("proxy.lan",), open=True
)
KEYED = Origins(allowed=("https://app.example",), hosts=(), open=False)

LOCAL_HOSTS = [
    "localhost",
    "localhost:3000",
    "LOCALHOST",
    "localhost.",
    "localhost.:3000",
    "my.localhost:3000",
    "127.0.0.1",
    "127.0.0.1:3000",
    "192.168.1.5:80",
    "[::1]",
    "[::1]:3000",
    "[fe80::1]:3000",
    "[2001:DB8::1]",
    "proxy.lan",
    "Proxy.LAN:3000",
    "proxy.lan.",
]
FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:3000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io",
    "notlocalhost",
    "xlocalhost",
    "proxy.lan.evil.example",
    "other.lan",
    "127.1",
    "2130706433",
    "0x7f000001",
    "",
    ":3000",
    "[",
    "[]",
    "[evil.example]",
    "localhost@evil.example",
    "evil.example#localhost",
    "localhost evil.example",
]


@pytest.mark.parametrize("host", [None, *LOCAL_HOSTS])
def test_an_open_server_answers_under_its_own_names(host: str | None) -> None:
    OPEN.check(host, None)


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_an_open_server_does_not_answer_under_a_rebound_name(host: str) -> None:
    with pytest.raises(ProxyError) as caught:
        OPEN.check(host, None)
    assert caught.value.failure is Failure.ORIGIN_NOT_ALLOWED
    assert "ALLOWED_HOSTS" in caught.value.message


@pytest.mark.parametrize("origin", ["https://app.example", "HTTPS://APP.example", None])
def test_an_open_server_answers_pages_of_listed_origins(origin: str | None) -> None:
    OPEN.check("localhost", origin)


FOREIGN_ORIGINS = [
    "https://evil.example",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example.evil.example",
    "https://sub.app.example",
    "http://localhost:3000",
    "null",
    "",
    "*",
    "file://",
]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_an_open_server_does_not_answer_other_pages(origin: str) -> None:
    with pytest.raises(ProxyError) as caught:
        OPEN.check("localhost:3000", origin)
    assert caught.value.failure is Failure.ORIGIN_NOT_ALLOWED
    assert "CORS_ORIGINS" in caught.value.message


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site "])
def test_an_open_server_does_not_answer_what_other_pages_load(site: str) -> None:
    with pytest.raises(ProxyError) as caught:
        OPEN.check("localhost:3000", None, site)
    assert caught.value.failure is Failure.ORIGIN_NOT_ALLOWED
    OPEN.check("localhost:3000", "https://app.example", site)
    KEYED.check("localhost:3000", None, site)


@pytest.mark.parametrize("site", [None, "", "none", "same-origin", "unheard-of"])
def test_an_open_server_answers_what_no_other_page_has_asked_for(site: str | None) -> None:
    OPEN.check("localhost:3000", None, site)


@pytest.mark.parametrize("host", [None, *LOCAL_HOSTS, *FOREIGN_HOSTS])
@pytest.mark.parametrize("origin", [None, "https://app.example", "https://evil.example"])
def test_a_server_with_keys_refuses_neither(host: str | None, origin: str | None) -> None:
    KEYED.check(host, origin)


@pytest.mark.parametrize(
    ("origin", "sent"),
    [
        (None, None),
        ("https://app.example", "https://app.example"),
        *[(origin, None) for origin in FOREIGN_ORIGINS],
    ],
)
def test_only_listed_origins_get_cors_headers(origin: str | None, sent: str | None) -> None:
    assert KEYED.permitted(origin) == sent


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_a_star_allows_every_origin_but_is_no_header_for_other_programs(origin: str) -> None:
    anybody = Origins(allowed=("*",), hosts=(), open=False)
    assert anybody.permitted(origin) == "*"
    assert anybody.permitted(None) is None


def test_a_refusal_quotes_a_hostile_name_only_in_part() -> None:
    with pytest.raises(ProxyError) as caught:
        OPEN.check("h" * 10_000, None)
    assert len(caught.value.message) < 400
    with pytest.raises(ProxyError) as caught:
        OPEN.check("localhost", "o" * 10_000)
    assert len(caught.value.message) < 400
