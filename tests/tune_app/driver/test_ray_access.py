"""One rule for address and token, whatever the command."""

from pathlib import Path

import pytest

from tune_app.driver.ray_access import AddressError, cluster_address, use_token_if_there


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        (None, None, None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        (None, "", None),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", None, "auto"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("local", None, None),
        ("local", "10.0.0.1:6379", None),
        (None, "local", None),
        (None, "auto", "auto"),
        ("head:6379", "10.0.0.1:6379", "head:6379"),
        ("[::1]:6379", None, "[::1]:6379"),
    ],
)
def test_the_option_goes_before_the_variable_and_local_before_both(
    given: str | None, variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(given) == expected


@pytest.mark.parametrize(
    ("given", "variable", "told"),
    [
        ("http://127.0.0.1:8265", None, "medtune submit --address http://127.0.0.1:8265"),
        (None, "http://127.0.0.1:8265", "RAY_ADDRESS=http"),
        ("ray://head:10001", None, "a Ray client cannot run a study"),
        ("head", None, "write HOST:PORT"),
        ("head:0", None, "write HOST:PORT"),
        ("head:65536", None, "write HOST:PORT"),
        ("head:6379/x", None, "write HOST:PORT"),
        ("a b:6379", None, "write HOST:PORT"),
        (":6379", None, "write HOST:PORT"),
        ("::1:6379", None, "write HOST:PORT"),
    ],
)
def test_what_is_no_cluster_is_told_with_what_to_do(
    given: str | None, variable: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(AddressError, match=r"--address|RAY_ADDRESS") as error:
        cluster_address(given)
    assert told in str(error.value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    return tmp_path


def token_file(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("0" * 32)
    path.chmod(0o644)
    return path


def test_a_token_path_that_leads_nowhere_is_told_as_such(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as another cluster's token, which is what Ray's refusal looks like."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "gone"))
    with pytest.raises(AddressError, match=r"RAY_AUTH_TOKEN_PATH=.*gone: no such file"):
        use_token_if_there()


def test_a_token_that_is_there_is_sent_and_its_file_is_its_owners_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert use_token_if_there() is None
    saved = token_file(home / ".ray" / "auth_token")
    assert use_token_if_there() == "~/.ray/auth_token"
    assert saved.stat().st_mode & 0o777 == 0o600
    named = token_file(home / "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert use_token_if_there() == "RAY_AUTH_TOKEN_PATH"
    assert named.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1" * 32)
    assert use_token_if_there() == "RAY_AUTH_TOKEN"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert use_token_if_there() is None
