"""The rights that reading and changing take, and requests that are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import BEARER, TOKEN
from starlette.testclient import TestClient

from tune_app.serve.access import (
    GLOBAL_TRIES,
    MOST_ADDRESSES,
    TRIES,
    WINDOW_S,
    Access,
    Refused,
    Throttle,
)
from tune_app.serve.app import build_app
from tune_app.serve.server import serve
from tune_app.study.errors import SpecError


def test_every_answer_forbids_inline_scripts_framing_and_guessing(client: TestClient) -> None:
    for path in ("/", "/serve.js", "/api/studies", "/api/nothing", "/api/openapi.json"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
    page = client.get("/").text
    assert "style=" not in page
    assert "<script>" not in page
    assert "http" not in page.replace("http-equiv", ""), "an address of the network"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8321", 200), ("localhost:9000", 200), ("[::1]:8321", 200), ("10.0.0.7", 200),
        ("[::1]evil.example", 421), ("[::1", 421), ("127.0.0.1:8321:1", 421), ("user@127.0.0.1", 421), ("127.0.0.1:x", 421),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:8321", 421), ("", 421),
    ],
)  # fmt: skip
def test_a_name_that_is_not_the_services_is_refused(
    client: TestClient, host: str, status: int
) -> None:
    assert client.get("/api/studies", headers={"host": host}).status_code == status


CHANGES = [
    ("/api/studies", {"name": "x", "spec": {}}),
    ("/api/check", {}),
    ("/api/measure", {}),
    ("/api/studies/first/start", None),
    ("/api/studies/first/stop", None),
    ("/api/studies/first/trials/00001/stop", None),
    ("/api/studies/first/confirm", {"folds": "7"}),
    ("/api/studies/first/ablate", {"name": "first"}),
    ("/api/studies/first/export", {"name": "x", "trial": "00001", "confirmed": True}),
]


@pytest.mark.parametrize(("path", "body"), CHANGES)
def test_changing_takes_the_token_and_for_a_browser_its_own_page(
    client: TestClient, path: str, body: Any
) -> None:
    def status(**headers: str) -> int:
        return client.post(
            path,
            json=body,
            headers={name.replace("_", "-"): text for name, text in headers.items()},
        ).status_code

    assert status() == 401
    assert status(authorization="Bearer wrong") == 401
    assert status(**BEARER, origin="http://evil.example") == 403
    assert status(**BEARER) in (409, 422), "let through, and refused for its content"
    session = client.post("/api/session", json={"token": TOKEN}).json()
    assert status() == 403, "a cookie alone is what another site's form would send"
    assert status(x_medtune_csrf="0" * 64) == 403
    good = {"x_medtune_csrf": session["csrf"]}
    assert status(**good, origin="http://evil.example") == 403
    assert status(**good, origin="null") == 403
    assert status(**good, sec_fetch_site="cross-site") == 403
    assert status(**good, origin="http://127.0.0.1:8321", sec_fetch_site="same-origin") in (
        409,
        422,
    )


def test_the_cookie_is_out_of_scripts_and_other_sites_reach_and_expires(client: TestClient) -> None:
    answer = client.post("/api/session", json={"token": TOKEN})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    clock = [1e9]
    access = Access(TOKEN, now=lambda: clock[0])
    session = access.new_session()
    assert access.is_session(session)
    assert not access.is_session(session[:-1] + ("0" if session[-1] != "0" else "1"))
    assert not Access("another token", now=lambda: clock[0]).is_session(session)
    clock[0] += 13 * 3600
    assert not access.is_session(session)
    for nonsense in ("", ".", "..", "x.y.z", "9" * 400):
        assert not access.is_session(nonsense)


def test_reading_takes_the_token_where_others_can_reach_the_service(
    tmp_path: Path, own_cache: None
) -> None:
    for access in (Access(TOKEN, host="0.0.0.0"), Access(TOKEN, private=True)):
        with TestClient(build_app(tmp_path, access), base_url="http://127.0.0.1:8321") as client:
            for path in ("/api/studies", "/api/form", "/api/openapi.json", "/api/studies/x/events"):
                assert client.get(path).status_code == 401, path
            assert client.get("/").status_code == 200
            assert client.get("/api/studies", headers=BEARER).status_code == 200
            client.post("/api/session", json={"token": TOKEN})
            assert client.get("/api/studies").status_code == 200


def test_wrong_tokens_wait_and_the_right_one_is_let_in(client: TestClient) -> None:
    def read(token: str) -> int:
        return client.get("/api/studies", headers={"authorization": f"Bearer {token}"}).status_code

    for _ in range(TRIES):
        assert client.post("/api/session", json={"token": "guess"}).status_code == 403
    refused = client.post("/api/session", json={"token": "another guess"})
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= WINDOW_S + 1
    assert (read("a guess"), read(TOKEN[:-1]), read(TOKEN)) == (429, 429, 200)
    assert client.post("/api/session", json={"token": TOKEN}).status_code == 200
    assert read("a guess") == 429, "the right one must not give the guesses a new start"


def test_a_token_that_is_easy_to_guess_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="MEDTUNE_TOKEN has 4 characters: choose at least 16"):
        serve(tmp_path, host="127.0.0.1", port=0, token="1234")


def test_the_throttle_forgets_and_cannot_be_filled_up() -> None:
    clock = [0.0]
    throttle = Throttle(now=lambda: clock[0])
    for _ in range(TRIES):
        throttle.check("a")
        throttle.wrong("a")
    throttle.check("b")
    with pytest.raises(Refused, match="too many"):
        throttle.check("a")
    clock[0] += WINDOW_S + 1
    throttle.check("a")
    for number in range(GLOBAL_TRIES):
        throttle.wrong(f"address {number}")
    with pytest.raises(Refused):
        throttle.check("somebody new")
    for number in range(2 * MOST_ADDRESSES):
        throttle.wrong(f"{number}")
    assert len(throttle._by_address) == MOST_ADDRESSES


def test_a_body_that_is_too_large_is_refused(client: TestClient) -> None:
    assert client.post("/api/check", content=b"x" * 300_000, headers=BEARER).status_code == 413


def test_a_body_with_two_lengths_is_refused_and_the_connection_ends(client: TestClient) -> None:
    """A proxy that goes by the other length would read what follows as another client's request."""
    both = BEARER | {"content-length": "2", "transfer-encoding": "chunked"}
    answer = client.post("/api/check", content=b"{}", headers=both)
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")


@pytest.mark.parametrize(
    "others",
    ['x={"a":1}; %s', "%s; x=a b", 'x="open; %s', "%s; y=[1;2]; =; ;;z", "medtune_8321=old; %s", "x=é; %s"],
)  # fmt: skip
def test_cookies_of_other_services_do_not_log_the_browser_out(
    client: TestClient, others: str
) -> None:
    value = Access(TOKEN).new_session()
    cookie = (others % f"medtune_8321={value}").encode()
    assert client.get("/api/session", headers={b"cookie": cookie}).json()["logged_in"]


def test_a_session_ends_on_the_server_and_stays_ended(client: TestClient, tmp_path: Path) -> None:
    value = client.post("/api/session", json={"token": TOKEN}).cookies["medtune_8321"]
    copied = {"cookie": f"medtune_8321={value}"}
    assert client.get("/api/session", headers=copied).json()["logged_in"]
    client.delete("/api/session", headers=copied)
    assert not client.get("/api/session", headers=copied).json()["logged_in"]

    file = tmp_path / "ended.json"
    access = Access(TOKEN, ended=file)
    session, other = access.new_session(), access.new_session()
    access.end_session(session)
    access.end_session("nonsense")
    again = Access(TOKEN, ended=file)
    assert (again.is_session(session), again.is_session(other)) == (False, True)
    assert session not in file.read_text()
    file.write_text("[")
    with pytest.raises(ValueError, match="damaged, remove it"):
        Access(TOKEN, ended=file)


@pytest.mark.parametrize(
    ("headers", "secure"),
    [({}, False), ({"x-forwarded-proto": "https"}, True), ({"origin": "https://127.0.0.1:8321"}, True)],
)  # fmt: skip
def test_the_cookie_stays_with_tls_where_there_is_tls(
    client: TestClient, headers: dict[str, str], secure: bool
) -> None:
    answer = client.post("/api/session", json={"token": TOKEN}, headers=headers)
    assert ("secure" in answer.headers["set-cookie"].lower()) == secure


def test_a_long_body_is_refused_however_it_is_sent(client: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(8):
            yield b" " * 65536

    for content in (b" " * 2**19, pieces()):
        headers = {**BEARER, "content-type": "application/json"}
        answer = client.post("/api/check", content=content, headers=headers)
        assert answer.status_code == 413
