"""What is nowhere here is fetched, whole and as it was published, or not at all; from a site of our own."""

import gzip
import resource
import socket
import struct
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from limbeck.core.refused import Refused
from limbeck.data import cifar10, cifar100, fashion_mnist, published
from limbeck.data.published import Online, find, read, shelves

FILES = {"a.bin": b"a" * 3_000_000, "b.bin": b"b" * 7}
GET = "put a.bin and b.bin in a folder set"


class Site(ThreadingHTTPServer):
    """Serves `served` under /good/, with its last byte changed under /changed/, half of it under /short/,
    nothing under /empty/, and never answers under /silent/. What it was asked for stands in `asked`."""

    daemon_threads = True

    def __init__(self, served: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.served, self.asked = served, list[str]()

    def at(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{folder}/"


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Site)
        self.server.asked.append(self.path)
        _, folder, name = self.path.split("/")
        content = self.server.served.get(name)
        if content is None or folder == "empty":
            self.send_error(404)
            return
        if folder == "silent":
            self.connection.recv(1)  # until the caller leaves
            return
        if folder == "changed":
            content = content[:-1] + b"?"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if folder == "short" else content)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.delenv("LIMBECK_OFFLINE")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Site(FILES) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def sums(files: dict[str, bytes]) -> dict[str, str]:
    return {name: sha256(content).hexdigest() for name, content in files.items()}


def online(*sites: str) -> Online:
    return Online(sites, sums(FILES), 3.0)


def found(where: Online, **places: Path | list[Path]) -> list[Path]:
    return find("The set", "set", [list(FILES)], GET, where, **places)  # type: ignore[arg-type]


def under(place: Path) -> list[Path]:
    return sorted(place.rglob("*"))


# --- fetched ---


def test_it_goes_into_the_cache_once_with_one_line(
    site: Site, alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = alone / "limbeck" / "set"
    paths = found(online(site.at("good")))
    assert paths == [home / "a.bin", home / "b.bin"]
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert under(alone) == [alone / "limbeck", home, *paths]
    said = f"limbeck: fetching The set, 3 MB, from {site.at('good')} into {home}\n"
    assert capfd.readouterr() == ("", said)
    assert found(online(site.at("good"))) == paths
    assert capfd.readouterr() == ("", "") and site.asked == ["/good/a.bin", "/good/b.bin"]


def test_without_a_cache_folder_named_it_is_the_homes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found(online(site.at("good")))[0] == tmp_path / ".cache" / "limbeck" / "set" / "a.bin"


def test_where_a_shelf_is_named_it_goes_there_and_makes_whole_what_was_not(
    site: Site, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(b"old")
    paths = found(online(site.at("good")))
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert under(tmp_path) == [tmp_path / "set", *paths] and not under(alone)


def test_what_is_here_is_not_fetched(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path / "nowhere"))
    assert found(online(site.at("good")), elsewhere=[tmp_path])[0].parent == tmp_path
    assert not site.asked


@pytest.mark.parametrize("first", ["empty", "changed", "short"])
def test_another_site_stands_in(first: str, site: Site) -> None:
    paths = found(online(site.at(first), site.at("good")))
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert site.asked == [f"/{folder}/{name}" for name in FILES for folder in (first, "good")]


# --- not fetched ---


@pytest.mark.parametrize("value", ["1", "yes"])
def test_offline_nobody_is_asked(
    value: str, site: Site, alone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIMBECK_OFFLINE", value)
    with pytest.raises(Refused, match=r"The set was not found; .*; LIMBECK_OFFLINE is set, .*; put a\.bin"):
        found(online(site.at("good")))
    assert not site.asked and not under(alone) and capfd.readouterr() == ("", "")


def test_offline_may_be_said_to_be_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_OFFLINE", "0")
    assert len(found(online(site.at("good")))) == 2


def test_a_root_that_is_given_is_never_filled(site: Site, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=rf"looked in {tmp_path} \(none of its files\); put a\.bin"):
        found(online(site.at("good")), root=tmp_path)
    assert not site.asked and not under(tmp_path)


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("empty", "a.bin: 404 Not Found"),
        (
            "changed",
            f"a.bin: not the published file, for its 3,000,000 bytes .* expected {sums(FILES)['a.bin']}",
        ),
        ("short", "a.bin: (IncompleteRead|not the published file, for its 1,500,000 bytes)"),
    ],
)
def test_a_site_that_fails_is_told_of_and_leaves_nothing(
    folder: str, why: str, site: Site, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path / "shelf"))
    with pytest.raises(
        Refused, match=rf"The set was not found; .*; it could not be fetched: .*{why}.*; put a"
    ) as no:
        found(online(site.at(folder)))
    assert "\n" not in str(no.value)
    assert not under(alone) and not under(tmp_path)


def test_every_site_that_failed_is_told_of(site: Site) -> None:
    with pytest.raises(
        Refused, match=r"/empty/a\.bin: 404 Not Found, and .*/changed/a\.bin: not the published"
    ):
        found(online(site.at("empty"), site.at("changed")))


def test_a_file_that_fails_takes_the_others_with_it(site: Site, alone: Path) -> None:
    site.served = {"a.bin": FILES["a.bin"]}
    with pytest.raises(Refused, match=r"b\.bin: 404 Not Found"):
        found(online(site.at("good")))
    assert site.asked == ["/good/a.bin", "/good/b.bin"] and not under(alone)


def test_no_network_is_one_sentence(site: Site, alone: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}/"  # bound, but nobody listens
        with pytest.raises(Refused, match=r"not be fetched: .*/a\.bin: .*refused; put a\.bin") as no:
            found(online(address))
    assert "\n" not in str(no.value) and not under(alone) and not site.asked


def test_a_site_that_says_nothing_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "PATIENCE", 0.05)
    with pytest.raises(Refused, match=r"/silent/a\.bin: timed out; put"):
        found(online(site.at("silent")))


def test_a_full_disk_is_one_sentence_and_left_as_it_was(site: Site, alone: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # no file may be larger: a.bin is
    try:
        with pytest.raises(
            Refused, match=r"The set cannot be kept in .*limbeck.*: File too large; make room .*3 MB"
        ):
            found(online(site.at("good"), site.at("good")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert site.asked == ["/good/a.bin"] and not under(alone)


def test_a_place_that_is_no_folder_is_one_sentence(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").write_text("a file")
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    with pytest.raises(Refused, match=rf"The set cannot be kept in {tmp_path / 'set'}: File exists; "):
        found(online(site.at("good")))
    assert under(tmp_path) == [tmp_path / "set"]


# --- the sets ---


def test_fashion_mnist_comes_as_it_is_published(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files are packed otherwise than Debian's: both sums are known."""
    rng = np.random.default_rng(0)
    files = {}
    for part, rows in (("train", 240), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (rows, 28, 28), np.uint8)),
            ("labels-idx1", (np.arange(rows) % 10).astype(np.uint8)),
        ):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            files[f"{part}-{kind}-ubyte.gz"] = gzip.compress(head + array.tobytes())
    assert list(fashion_mnist.ONLINE.sha256) == list(files)
    site.served = files
    monkeypatch.setattr(fashion_mnist, "ONLINE", Online([site.at("good")], sums(files), 0.2))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", Path("nowhere"))
    splits = fashion_mnist.load()
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [220, 20, 20]


def test_every_set_says_where_it_is_published_and_pins_what_it_takes() -> None:
    for module in (fashion_mnist, cifar10, cifar100):
        assert all(place.startswith("http") and place.endswith("/") for place in module.ONLINE.sites)
        assert all(len(found) == 64 for found in module.ONLINE.sha256.values())
    assert [list(module.ONLINE.sha256) for module in (cifar10, cifar100)] == [
        ["cifar-10-binary.tar.gz"],
        ["cifar-100-binary.tar.gz"],
    ]


def test_a_file_is_read_by_any_sum_pinned_for_its_name(tmp_path: Path) -> None:
    path, other = tmp_path / "b.bin", {"b.bin": sha256(b"other").hexdigest(), "c.bin": sums(FILES)["b.bin"]}
    path.write_bytes(FILES["b.bin"])
    assert read(path, other, sums(FILES)) == read(path, sums(FILES), other) == FILES["b.bin"]
    with pytest.raises(Refused, match=f"expected {other['b.bin']};"):
        read(path, other)


def test_a_folder_beside_the_work_is_looked_in_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert shelves() == [Path("../shared/data")]
    monkeypatch.setenv("LIMBECK_DATA", "named")
    assert shelves() == [Path("named"), Path("../shared/data")]
    (tmp_path / "shared" / "data" / "set").mkdir(parents=True)
    (tmp_path / "shared" / "data" / "set" / "a").touch()
    (found,) = find("The set", "set", [["a"]], "get it", Online((), {}, 0))
    assert found.resolve() == tmp_path / "shared" / "data" / "set" / "a"
