"""Download a teacher, for those who have a network: pinned by its SHA-256, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.bundle import write_atomically

_CHUNK_BYTES = 1 << 16
_LARGEST_BYTES = 1 << 30
_TIMEOUT_S = 30.0


class FetchFailed(Exception):
    """Nothing was written; the message says why."""


class FetchMisused(FetchFailed):
    """What was asked for cannot be fetched, however often it is tried."""


def fetch(url: str, sha256: str, path: Path) -> None:
    """Download a file and check it before anything is written.

    Args:
        url: http, https or file.
        sha256: of the file, 64 hex digits.
        path: to write.

    Raises FetchFailed, or OSError when the disk refuses.
    """
    wanted = sha256.lower()
    if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
        raise FetchMisused(f"--sha256 {sha256!r} is not 64 hex digits")
    if url.split(":", 1)[0] not in ("http", "https", "file"):
        raise FetchMisused(f"{url}: not an http, https or file address")
    pieces, count = [], 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while piece := response.read(_CHUNK_BYTES):
                pieces.append(piece)
                count += len(piece)
                if count > _LARGEST_BYTES:
                    raise FetchFailed(f"{url}: larger than {_LARGEST_BYTES >> 20} MiB, no teacher is")
    except urllib.error.HTTPError as error:
        raise FetchFailed(f"{url}: the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise FetchFailed(
            f"{url}: cannot be reached: {error.reason}. A teacher ships with inspectord; no download is needed"
        ) from error
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise FetchFailed(f"{url}: the transfer broke off after {count} bytes: {error!r}") from error
    if total and count != total:
        raise FetchFailed(f"{url}: {count} of {total} bytes came: truncated")
    blob = b"".join(pieces)
    found = hashlib.sha256(blob).hexdigest()
    if found != wanted:
        raise FetchFailed(f"{url}: SHA-256 is {found}, not {wanted}: another file, or damaged on the way")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, blob)
