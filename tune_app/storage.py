"""Where a study is kept when that is no folder: object storage by its URL."""

import re
from pathlib import Path

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")


def is_url(place: str | Path) -> bool:
    """Whether `place` is object storage, not a folder."""
    return url_of(place) is not None


def url_of(place: str | Path) -> str | None:
    """Return `place` as a URL, None for a folder. A Path has lost one of the URL's slashes, which is given back."""
    found = re.match(rf"({'|'.join(SCHEMES)}):/{{1,2}}([^/].*)", str(place), re.DOTALL)
    return f"{found[1]}://{found[2]}" if found else None
