"""Published data sets: where on this machine their files are, how they get here, and whether they are the
files that were published.

Scores are compared over years and machines; they mean nothing once an image has moved.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import torch

from limbeck.core.refused import Refused

PATIENCE = 30.0
"""Seconds without a byte after which a site is given up."""


@dataclass(frozen=True)
class Online:
    """Where a set is published.

    sites: folders of the web, each with all the files; the first that serves a file as published is taken.
    sha256: of each file. megabytes: of all together, for the user to know what is coming.
    """

    sites: Sequence[str]
    sha256: Mapping[str, str]
    megabytes: float


def shelves() -> list[Path]:
    """Folders in which data sets, and what came with them, may lie, each in a folder of its own: what the
    environment variable LIMBECK_DATA names, and `../shared/data`."""
    named = os.environ.get("LIMBECK_DATA")
    return [*([Path(named)] if named else []), Path("..", "shared", "data")]


def find(
    called: str,
    folder: str,
    forms: Sequence[Sequence[str]],
    get: str,
    online: Online,
    root: Path | None = None,
    elsewhere: Sequence[Path] = (),
) -> list[Path]:
    """The files of a data set: of the first place that has any of its forms whole, the first such form.

    A form is the names of all its files. Looked in: `root` and nowhere else if it is given; otherwise
    `folder` on each of the `shelves`, `elsewhere`, and `folder` in the user's cache. When they
    are in none of these they are fetched from `online` into LIMBECK_DATA, or else the cache, unless
    LIMBECK_OFFLINE is set. `get` ends the refusal: how to get the files.
    """
    shelf = os.environ.get("LIMBECK_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck" / folder
    home = Path(shelf) / folder if shelf else cache
    places = [Path(root)] if root else [*(place / folder for place in shelves()), *elsewhere, cache]
    looked = []
    for place in places:
        absent = [[name for name in form if not (place / name).is_file()] for form in forms]
        for form, lacks in zip(forms, absent, strict=True):
            if not lacks:
                return [place / name for name in form]
        begun = [lacks for form, lacks in zip(forms, absent, strict=True) if len(lacks) < len(form)]
        if begun:
            nearest = min(begun, key=len)
            looked.append(f"{place} (lacks {', '.join(nearest)})")
        else:
            looked.append(f"{place} ({'none of its files' if place.is_dir() else 'no such folder'})")
    if not root and not shelf:
        looked.insert(0, f"LIMBECK_DATA/{folder} (the environment variable LIMBECK_DATA is not set)")
    missing = f"{called} was not found; looked in {', '.join(looked)}"
    if root:
        raise Refused(f"{missing}; {get}.")
    if os.environ.get("LIMBECK_OFFLINE", "0") not in ("", "0"):
        raise Refused(f"{missing}; LIMBECK_OFFLINE is set, so it was not fetched; {get}.")
    print(
        f"limbeck: fetching {called}, {online.megabytes:g} MB, from {online.sites[0]} into {home}",
        file=sys.stderr,
        flush=True,
    )
    try:
        return _fetched(online, home)
    except _NotServed as error:
        raise Refused(f"{missing}; it could not be fetched: {error}; {get}.") from None
    except OSError as error:
        raise Refused(
            f"{called} cannot be kept in {home}: {error.strerror}; make room for its {online.megabytes:g} "
            "MB, or let LIMBECK_DATA name another folder."
        ) from None


def _fetched(online: Online, home: Path) -> list[Path]:
    """All files, or none: they wait in or above `home`, on the same disk, until the last of them is right."""
    near = next(place for place in (home, *home.parents) if place.is_dir())
    with TemporaryDirectory(dir=near, prefix=".limbeck-") as waiting:
        for name, expected in online.sha256.items():
            _fetch(name, expected, online.sites, Path(waiting) / name)
        home.mkdir(parents=True, exist_ok=True)
        return [(Path(waiting) / name).replace(home / name) for name in online.sha256]


def _fetch(name: str, expected: str, sites: Sequence[str], path: Path) -> None:
    failures = []
    for site in sites:
        found, size = sha256(), 0
        try:
            with path.open("wb") as file:
                for piece in _pieces(site + name):
                    found.update(piece)
                    size += file.write(piece)
        except _NotServed as error:
            failures.append(f"{site}{name}: {error}")
            continue
        if found.hexdigest() == expected:
            return
        failures.append(
            f"{site}{name}: not the published file, for its {size:,} bytes have the sha256 "
            f"{found.hexdigest()}, expected {expected}"
        )
    raise _NotServed(", and ".join(failures))


def _pieces(url: str) -> Iterator[bytes]:
    """What a site serves, as it comes. That it fails is told apart from a disk that does."""
    try:
        with urlopen(url, timeout=PATIENCE) as answer:
            while piece := answer.read(1 << 20):
                yield piece
    except HTTPError as error:
        error.close()  # it holds the connection
        raise _NotServed(f"{error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise _NotServed(str(getattr(error, "reason", error)) or type(error).__name__) from None


class _NotServed(Exception):
    """No site has a file as it was published; why."""


def read(path: Path, *pinned: Mapping[str, str]) -> bytes:
    """The bytes of a file, once their sha256 is one of those pinned for its name."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from None
    found = sha256(content).hexdigest()
    expected = sorted({sums[path.name] for sums in pinned if path.name in sums})
    if found not in expected:
        raise Refused(
            f"{path} is not the published file: its {len(content):,} bytes have the sha256 {found}, "
            f"expected {' or '.join(expected)}; it was cut short, damaged or changed, so get it again."
        )
    return content


def within(labels: np.ndarray, classes: int, called: Path | str) -> torch.Tensor:
    """A file's labels as Data wants them; the first that is no class is refused with the file's name."""
    odd = np.flatnonzero(labels >= classes)
    if len(odd):
        raise Refused(
            f"{called} has label {labels[odd[0]]} for sample {odd[0]}, expected 0 to {classes - 1}; it is "
            "damaged, so get it again."
        )
    return torch.from_numpy(labels.astype(np.int64))
