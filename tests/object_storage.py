"""A real S3 server on loopback for tests, and the variables of the environment that lead there."""

import http.client
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainables.data.storage import Remote

BUCKET = "studies"


@contextmanager
def s3_server(port: int = 0) -> Iterator[dict[str, str]]:
    """An S3 server with a bucket called studies; one that is started again in this process has its objects again."""
    from moto.server import ThreadedMotoServer

    serving = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        urllib.request.urlopen(
            urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=30
        ).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        serving.stop()


def put_folder(url: str, folder: Path) -> None:
    """Copy a folder's files to objects of the same names below the URL."""
    remote = Remote(url)
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            remote.put(path.relative_to(folder).as_posix(), path)


def put_raw(server: dict[str, str], path: str, content: bytes) -> None:
    """Write an object whose name may be anything: libraries put `..` in order first."""
    connection = http.client.HTTPConnection(
        server["AWS_ENDPOINT_URL"].removeprefix("http://"), timeout=30
    )
    connection.request("PUT", path, content)
    assert connection.getresponse().status in (200, 204)
    connection.close()
