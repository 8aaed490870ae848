"""Where a run lives: in a folder, or under a URI with a working copy on each machine; names only, nothing is opened."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""What ``pyarrow.fs.FileSystem.from_uri`` opens. https://arrow.apache.org/docs/python/filesystems.html"""
CACHE_VARIABLE = "UNLEARN_CACHE"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FLAT = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?=[^/])")
_SECRET_WORDS = re.compile(r"key|secret|token|passw|credential|signature|^sig$|^sas", re.IGNORECASE)


def is_uri(place: str | Path) -> bool:
    """Whether a place is a URI rather than a folder of this machine."""
    return _URI.match(str(place)) is not None


def given_uri(place: str | Path) -> str:
    """The place as it was typed: a Path swallows all but one slash of a URI."""
    return _FLAT.sub(lambda found: f"{found[1]}:///" if found[1].lower() == "file" else f"{found[1]}://", str(place))


def uri_problem(uri: str) -> str | None:
    """Why a URI cannot be the home of runs, in words that repeat no secret; None if it can."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "is not a well-formed URI"
    if "@" in parts.netloc or any("@" in value or _SECRET_WORDS.search(name) for name, value in parse_qsl(parts.query, True)):
        return (
            "holds keys: they would end in logs and reports. Give the address alone, and the keys through the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or the machine's profile"
        )
    if parts.scheme.lower() not in SCHEMES:
        return f"must be a folder, a mounted one, or a URI with one of {', '.join(SCHEMES)}"
    if parts.fragment:
        return "must have no '#'"
    if parts.scheme != "file" and not parts.netloc:
        return f"names no bucket: {parts.scheme}://BUCKET/FOLDER"
    if parts.scheme == "file" and (parts.netloc or not parts.path):
        return "must be file:///FOLDER, with three slashes"
    return None


def redacted(uri: str) -> str:
    """A URI without what may be a key: user, password, and the values of its query."""
    parts = urlsplit(uri)
    query = "&".join(f"{name}=…" if _SECRET_WORDS.search(name) else f"{name}={value}" for name, value in parse_qsl(parts.query, True))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()


def join_uri(uri: str, *names: str) -> str:
    """The URI of something below; its query stays at its end."""
    parts = urlsplit(uri)
    return parts._replace(path="/".join([parts.path.rstrip("/"), *names])).geturl()


def cache_root() -> Path:
    """Folder of this user's working copies: ``UNLEARN_CACHE``, or ``~/.cache/unlearn``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "unlearn").expanduser().absolute()


def working_copy(uri: str) -> Path:
    """The folder of this machine in which it works on the run that lives at a URI."""
    parts = urlsplit(uri)
    name = parts.path.rstrip("/").rpartition("/")[2] or "run"
    # With its query: two endpoints may have buckets of one name.
    digest = hashlib.sha256(parts._replace(path=parts.path.rstrip("/")).geturl().encode()).hexdigest()
    return cache_root() / "runs" / digest[:16] / name
