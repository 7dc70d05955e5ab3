"""One fine-tuning run, from a table of volumes to a row of metrics an epoch."""

from importlib import metadata


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, None where there is none: a source tree on PYTHONPATH has none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def medtune_version() -> str:
    """Return the version of medtune for people to read."""
    return installed_version("medtune") or "(not installed)"
