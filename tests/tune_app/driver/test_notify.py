"""Messages of a study: their contents for a command and for an address, and that none of them can delay or end a study."""

import http.server
import json
import logging
import sys
import threading
from pathlib import Path

import pytest

from tune_app.driver import notify
from tune_app.driver.notify import Notifier
from tune_app.study.errors import SpecError

COLLAPSED = {"trial": "00003", "state": "stopped", "reason": "diagnosis: ...",
             "verdict": "ema_lag", "verdict_summary": "averaged weights never caught up"}  # fmt: skip
FAILED = {"trial": "00004", "state": "failed", "reason": "out of memory", "verdict": None}
HEALTHY = {"trial": "00005", "state": "completed", "reason": None, "verdict": "healthy"}


@pytest.fixture(autouse=True)
def no_target_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)


def test_a_command_gets_the_message_in_its_environment_and_as_json(tmp_path: Path) -> None:
    code = (
        "import json, os, sys; told = {k: v for k, v in os.environ.items() if k.startswith('MEDTUNE_')};"
        "told['stdin'] = json.load(sys.stdin); open(sys.argv[1], 'w').write(json.dumps(told))"
    )
    notifier = Notifier(f'{sys.executable} -c "{code}" {tmp_path}/told.json', "studies/first")
    notifier.trial_ended(COLLAPSED)
    for thread in notifier._threads:
        thread.join(60)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["MEDTUNE_EVENT"] == "collapse"
    assert told["MEDTUNE_STUDY"] == "studies/first"
    assert told["MEDTUNE_TRIAL"] == "00003"
    assert told["MEDTUNE_TEXT"] == "trial 00003: averaged weights never caught up"
    assert told["stdin"] == {
        "event": "collapse",
        "study": "studies/first",
        "trial": "00003",
        "text": "trial 00003: averaged weights never caught up",
    }


def test_an_address_gets_the_same_in_a_post() -> None:
    got = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            got.append((self.headers["Content-Type"], json.loads(self.rfile.read(size))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        notifier = Notifier(f"http://127.0.0.1:{server.server_port}/hook", "s")
        notifier.send("end", "the study has ended: trials 3 completed", states={"completed": 3})
        for thread in notifier._threads:
            thread.join(60)
        server.shutdown()
    ((kind, message),) = got
    assert kind == "application/json"
    assert message["event"] == "end"
    assert message["states"] == {"completed": 3}


def test_only_the_first_collapse_and_the_first_failure_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    monkeypatch.setattr(
        Notifier, "send", lambda self, event, text, trial=None: sent.append((event, trial))
    )
    notifier = Notifier("true", "s")
    for record in (
        HEALTHY,
        COLLAPSED,
        COLLAPSED | {"trial": "00006"},
        FAILED,
        FAILED | {"trial": "00007"},
    ):
        notifier.trial_ended(record)
    assert sent == [("collapse", "00003"), ("failure", "00004")]


@pytest.mark.parametrize(
    "target", ["exit 3", "no-such-command-at-all", "http://127.0.0.1:9/token-1234"]
)
def test_a_message_that_cannot_be_delivered_is_logged_without_the_address(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(target, "s")
    with caplog.at_level(logging.WARNING):
        notifier.send("end", "text")
        for thread in notifier._threads:
            thread.join(60)
    assert "notify: end was not delivered" in caplog.text
    assert "1234" not in caplog.text


def test_a_command_that_hangs_is_left_alone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "CLOSING_S", 0.0)
    monkeypatch.setattr(notify, "DEADLINE_S", 0.5)
    notifier = Notifier("sleep 60", "s")
    notifier.send("end", "text")
    notifier.close()
    assert notifier._threads[0].daemon
    notifier._threads[0].join(30)
    assert not notifier._threads[0].is_alive(), "it was ended after its deadline"


def test_another_kind_of_address_is_refused_before_the_study_begins() -> None:
    with pytest.raises(SpecError, match="ftp://"):
        Notifier("ftp://example.org/x", "s")


def test_the_environment_names_it_where_no_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.VARIABLE, "true")
    assert Notifier(None, "s").target == "true"
    assert Notifier("false", "s").target == "false"
