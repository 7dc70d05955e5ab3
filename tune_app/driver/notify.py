"""Messages to the user while a study runs unattended: a command, or an HTTP address, of the user's own.

Sent once for the first collapse, once for the first failed trial, and at the end of a session. A message that cannot be
delivered is logged and changes nothing else: it is sent from a thread, with a deadline, and the driver does not wait for it
longer than CLOSING_S at its end.
"""

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from tune_app.study.errors import SpecError
from tune_app.study.policy_spec import DEFAULT_ACTIONS
from tune_app.study.requests import log

Event = Literal["end", "interrupted", "collapse", "failure", "error"]

VARIABLE = "MEDTUNE_NOTIFY"
"""Environment variable that holds a command or an address where no option names one."""

DEADLINE_S = 20.0
"""Seconds that a command or a server may take."""

CLOSING_S = 5.0
"""Seconds that the driver waits at its end for messages that are on their way."""


class Notifier:
    """Sends messages of one session. `target`: a shell command, an http(s) address, or None for no messages.

    A command gets the message in the environment (MEDTUNE_EVENT, MEDTUNE_STUDY, MEDTUNE_TRIAL, MEDTUNE_TEXT), and as JSON
    on its standard input; an address gets the same JSON in a POST. Raises SpecError for another kind of address.
    """

    def __init__(self, target: str | None, study: str) -> None:
        self.target = target or os.environ.get(VARIABLE) or None
        self.study = study
        self._sent: set[str] = set()
        self._threads: list[threading.Thread] = []
        if self.target is not None and "://" in self.target.split(maxsplit=1)[0]:
            scheme = urlsplit(self.target).scheme
            if scheme not in ("http", "https"):
                raise SpecError(
                    f"notify: an address with {scheme}:// arrived: http:// or https:// is needed, or a command"
                )

    def trial_ended(self, record: Mapping[str, Any]) -> None:
        """Report the first trial that failed, and the first whose diagnosis is one that ends trials."""
        trial, verdict = record["trial"], record.get("verdict")
        if record["state"] == "failed":
            self.send_once("failure", f"trial {trial} failed: {record['reason']}", trial)
        elif verdict is not None and DEFAULT_ACTIONS.get(verdict) == "stop":
            self.send_once("collapse", f"trial {trial}: {record['verdict_summary']}", trial)

    def send_once(self, event: Event, text: str, trial: str | None = None) -> None:
        """Send the first message of its kind of this session."""
        if event not in self._sent:
            self._sent.add(event)
            self.send(event, text, trial)

    def send(self, event: Event, text: str, trial: str | None = None, **more: Any) -> None:
        """Send a message; returns at once."""
        if self.target is None:
            return
        message = {"event": event, "study": self.study, "trial": trial, "text": text, **more}
        thread = threading.Thread(target=self._deliver, args=(message,), name="notify", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Wait for messages that are on their way, CLOSING_S at most."""
        deadline = time.monotonic() + CLOSING_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _deliver(self, message: dict[str, Any]) -> None:
        assert self.target is not None
        body = json.dumps(message).encode()
        try:
            if urlsplit(self.target).scheme in ("http", "https"):
                request = urllib.request.Request(
                    self.target, data=body, headers={"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=DEADLINE_S):
                    return
            names = {"event": "EVENT", "study": "STUDY", "trial": "TRIAL", "text": "TEXT"}
            told = {f"MEDTUNE_{name}": str(message[key] or "") for key, name in names.items()}
            subprocess.run(
                self.target,
                shell=True,
                input=body,
                env={**os.environ, **told},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=DEADLINE_S,
                check=True,
                start_new_session=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            # An address may hold a token: the address and the command are never written to the log.
            log.warning("notify: %s was not delivered: %s", message["event"], type(error).__name__)
