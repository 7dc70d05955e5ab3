"""Ray's job server, as medtune uses it: send a study, follow its log, stop it, list what runs.

Errors of the network and of the token become one line each that names the remedy. Ray is imported only here below.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from tune_app.cluster.submit import Submission, cluster_place
from tune_app.driver.ray_access import use_token_if_there
from tune_app.study.files import job_name

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_EXIT = 130
"""Exit code that stands for a job that was stopped: as after Ctrl-C."""

RECONNECT_S = 60.0
"""Seconds for which a lost connection to the job server is tried again."""


class JobServerError(RuntimeError):
    """The job server cannot be reached, refuses the token, or knows no such job."""


def job_server(address: str | None) -> str:
    """Return the URL of the job server; raises JobServerError for other addresses, such as a Ray client address."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    url = given if "://" in given else f"http://{given}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobServerError(
            f"--address {given}: the job server is an http(s) address, such as {DEFAULT_ADDRESS}"
        )
    if parts.username or parts.password:
        raise JobServerError(
            "--address holds a password, which every process list shows: put a token in a file instead"
        )
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine's loopback only."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(
        ipaddress.ip_address(str(one).partition("%")[0]).is_loopback for one in found
    )


def open_to_anyone(url: str) -> bool:
    """Whether the job server lists its jobs to clients without a token. Raises JobServerError when none answers."""
    import requests

    try:
        return bool(requests.get(f"{url}/api/jobs/", timeout=30).status_code == 200)
    except requests.RequestException as error:
        raise JobServerError(unreachable(url, error)) from None


def unreachable(url: str, error: object) -> str:
    return (
        f"no job server answers at {url} ({type(error).__name__}): is the head running with its dashboard, and the tunnel "
        "to it (ssh -L 8265:127.0.0.1:8265 HEAD)?"
    )


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None, *, allow_open: bool = False) -> None:
        """Connect to `address`. Raises JobServerError when there is no answer, for a wrong or missing token, and for a job
        server that is on a network without a token, unless `allow_open`."""
        self.url = job_server(address)
        self.token = use_token_if_there()
        if (
            not allow_open
            and not is_loopback(str(urlsplit(self.url).hostname))
            and open_to_anyone(self.url)
        ):
            raise JobServerError(
                f"{self.url} runs the code of every client that reaches it: no token is asked for. Start the cluster with "
                "RAY_AUTH_MODE=token, or on loopback with a tunnel to it; --allow-open sends all the same"
            )
        from ray.job_submission import JobSubmissionClient

        for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with self._told():
            self.client = JobSubmissionClient(self.url)

    @contextmanager
    def _told(self) -> Iterator[None]:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            if "Authentication required" in str(error):
                raise JobServerError(
                    f"{self.url} asks for a token: save it in ~/.ray/auth_token (mode 600), or point RAY_AUTH_TOKEN_PATH "
                    "to its file; RAY_AUTH_MODE must not be disabled"
                ) from None
            raise JobServerError(
                f"{self.url} refuses the token of {self.token}: it is another cluster's"
            ) from None
        except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
            raise JobServerError(unreachable(self.url, error)) from None
        except RuntimeError as error:
            raise JobServerError(f"{self.url}: {str(error).strip().splitlines()[-1]}") from None

    def all(self) -> list[Any]:
        """Every submitted job that the cluster knows, oldest first."""
        with self._told():
            found = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def of_study(self, study: str) -> list[Any]:
        """The jobs of the study in folder or URL `study`, oldest first."""
        stem = job_name(study) + "-"
        return [job for job in self.all() if job.submission_id.startswith(stem)]

    def find(self, name: str) -> Any:
        """Return the job with this id, or the latest of this study. Raises JobServerError when there is none."""
        jobs = self.all()
        for job in jobs:
            if job.submission_id == name:
                return job
        if "/" in name:
            stem = job_name(cluster_place(name)) + "-"
            jobs = [job for job in jobs if job.submission_id.startswith(stem)]
            if jobs:
                return jobs[-1]
        raise JobServerError(
            f"{self.url} knows no job or study {name!r}: `medtune jobs list` lists those it knows"
        )

    def send(self, submission: Submission) -> None:
        """Upload the package and start the job."""
        with TemporaryDirectory() as folder, self._told():
            package = Path(folder) / "medtune.zip"
            package.write_bytes(submission.package)
            self.client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.submission_id,
                runtime_env={**submission.runtime_env, "working_dir": str(package)},
                metadata=dict(submission.metadata),
            )

    def stop(self, submission_id: str, *, wait_s: float = 120.0) -> str:
        """Ask the job to end, and wait until it has; returns its state."""
        with self._told():
            self.client.stop_job(submission_id)
        deadline = time.monotonic() + wait_s
        while (state := str(self.find(submission_id).status.value)) not in ENDED:
            if time.monotonic() > deadline:
                raise JobServerError(
                    f"{submission_id} has not ended {wait_s:.0f} s after the request to stop: ask again"
                )
            time.sleep(0.5)
        return state

    def log(self, submission_id: str) -> str:
        """The job's output so far."""
        with self._told():
            return str(self.client.get_job_logs(submission_id))

    def follow(self, submission_id: str, write: Callable[[str], object]) -> int:
        """Give the job's log to `write` as it grows; returns the job's exit code when it has ended.

        A lost connection is taken up where it broke, for a minute.
        """
        shown, lost_at = 0, None
        while True:
            try:
                shown = asyncio.run(self._tail(submission_id, shown, write))
                job = self.find(submission_id)
                if str(job.status.value) in ENDED:
                    # The stream may end a moment before the last lines are in it.
                    write(self.log(submission_id)[shown:])
                    return exit_code(job)
                lost_at = None
            except (JobServerError, OSError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > RECONNECT_S:
                    raise JobServerError(
                        f"{self.url} has not answered for {RECONNECT_S:.0f} s; the job continues if its head does: "
                        f"medtune jobs logs {submission_id} --follow"
                    ) from error
            time.sleep(1.0)

    async def _tail(self, submission_id: str, shown: int, write: Callable[[str], object]) -> int:
        """Write the log from character `shown` on; returns the number of characters seen."""
        seen = 0
        with self._told():
            async for text in self.client.tail_job_logs(submission_id):
                new = text[max(0, shown - seen) :]
                seen += len(text)
                if new:
                    write(new)
                shown = max(shown, seen)
        return shown


def exit_code(job: Any) -> int:
    """The exit code of an ended job: its driver's, 130 when it was stopped, 1 when it never ran."""
    state = str(job.status.value)
    if state == "SUCCEEDED":
        return 0
    if state == "STOPPED":
        return STOPPED_EXIT
    return int(job.driver_exit_code or 1)
