"""`medtune serve` as the tests of the service ask it: token, names of studies, and the service as a process."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from browsing import DEADLINE_S, Browser, click, wait, wait_for

TOKEN = "token-of-the-test"
BEARER = {"authorization": f"Bearer {TOKEN}"}
SECOND = "group~second & <b>third<~b>"
SECOND_PATH = "/api/studies/group~second%20&%20%3Cb%3Ethird%3C~b%3E"


class Service:
    """`medtune serve` as a separate process."""

    def __init__(self, folder: Path, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/"
        environment = os.environ | {"MEDTUNE_TOKEN": TOKEN, "MEDTUNE_CACHE": str(cache)}
        command = [
            sys.executable,
            "-m",
            "tune_app.cli",
            "serve",
            str(folder),
            "--port",
            str(self.port),
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        wait_for(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        try:
            with urllib.request.urlopen(f"{self.url}api/session", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def end(self, how: int = signal.SIGINT) -> str:
        self.process.send_signal(how)
        return str(self.process.communicate(timeout=DEADLINE_S)[1])


def text(browser: Browser, selector: str) -> str:
    return str(wait(browser, "return document.querySelector(arguments[0])?.textContent", selector))


def log_in(browser: Browser) -> None:
    field = browser.find_element("css selector", "#token")
    field.send_keys(TOKEN)
    click(browser, "dialog button[type=submit]")
    wait(browser, "return document.querySelector('#login').textContent === 'log out'")
