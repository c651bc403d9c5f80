"""A checkpoint comes back as it was, or a sentence says why not; no kill and no full disk leaves neither."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from limbeck.checkpoint import DTYPES, load, load_weights, save, save_weights, write_atomic
from limbeck.core.refused import Refused

ROOT = Path(__file__).parent.parent
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
RECIPE = "0123456789abcdef" * 4


def same(a: Any, b: Any) -> bool:
    """Equal in type and bit, all the way down; an OrderedDict may come back as a dict."""
    if isinstance(a, Tensor):
        a = a.detach().cpu().contiguous()
        bits = [x.clone().reshape(-1).view(torch.uint8).tolist() for x in (a, b)]
        return type(b) is Tensor and (a.dtype, a.shape) == (b.dtype, b.shape) and bits[0] == bits[1]
    if isinstance(a, dict):
        return (
            type(b) is dict
            and [(type(key), key) for key in a] == [(type(key), key) for key in b]
            and all(same(a[key], b[key]) for key in a)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)  # nan equals nan, 0.0 is not -0.0
    return a == b


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """One line that holds each of these, and says what was found and what was expected."""
    with pytest.raises(Refused) as caught:
        yield
    sentence = str(caught.value)
    for part in (*parts, "found ", ", expected ", "; "):
        assert str(part) in sentence, sentence
    assert "\n" not in sentence


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pair(folder: Path) -> list[str]:
    """The two names that a tidy folder holds."""
    return sorted([json.loads((folder / "checkpoint.json").read_text())["file"], "checkpoint.json"])


# Round trips


def test_plain_values_come_back_exactly(tmp_path: Path) -> None:
    state = {
        "none": None,
        "bools": [True, False],
        "ints": (0, -1, 2**53 - 1, -(2**53), 2**63, -(2**200), 7**9000),
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan")],
        "text": ["", "é\u0000\n\"'\\", "🜁", "\ud800", "nan"],
        "empty": [{}, [], (), ((),), [()]],
        "keys": {0: "int", "0": "str", -(2**70): "big", "": "empty", "a']['b": 1, "a": {"b": 2}},
        "looks like our own marks": [{"tensor": "x"}, {"int": "0x1"}, {"dict": []}, {"tuple": [1]}],
        "random": random.Random(0).getstate(),
        7: [({"deep": [({1: (None,)},)]},)],
    }
    save(tmp_path, state, fingerprint=RECIPE)
    assert same(state, load(tmp_path, fingerprint=RECIPE))
    # Strict JSON, so that other readers take it too: Python alone accepts NaN and Infinity.
    json.loads((tmp_path / "checkpoint.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("value", [None, 3, "text", (), [float("inf")], torch.arange(3), {}])
def test_a_state_may_be_any_single_value(tmp_path: Path, value: object) -> None:
    save(tmp_path, value, fingerprint=RECIPE)
    assert same(value, load(tmp_path))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, device: str) -> None:
    numbers = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (6, 16), generator=numbers, dtype=torch.uint8)  # NaN payloads and all
    if dtype is torch.bool:
        raw %= 2
    full = raw.view(dtype).to(device)
    tensors = {"full": full, "0-dim": full[1, 1], "empty": full[:0], "empty too": full.new_empty(2, 0, 3)}
    save(tmp_path, tensors, fingerprint=RECIPE)
    assert same(tensors, load(tmp_path))


def test_views_and_shared_memory_come_back_as_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    wave = torch.complex(base, base + 1)
    tied = nn.Parameter(base.clone())
    state: dict[str | int, Any] = {
        "shared": [base, base, base.T, base[1:3, ::2], base.flatten()[5:]],
        "expanded": torch.ones(1, 1).expand(3, 4),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "lazy": [wave.conj(), wave.conj().imag],
        "tied": {"encoder": tied, "decoder": tied},
        0: base,
        "0": -base,
    }
    save(tmp_path, state, fingerprint=RECIPE)
    back = load(tmp_path)
    assert same(state["lazy"][0].resolve_conj(), back["lazy"][0])
    assert same(state["lazy"][1].resolve_neg(), back["lazy"][1])
    assert same({**state, "lazy": None}, {**back, "lazy": None})
    back["shared"][0].zero_()
    assert back["shared"][1].any(), "two places of the state share memory"


def test_the_saved_state_is_the_one_at_the_call(tmp_path: Path) -> None:
    weight = torch.ones(3)
    save(tmp_path, {"w": weight}, fingerprint=RECIPE)
    weight.zero_()
    assert same(torch.ones(3), load(tmp_path)["w"])


def test_a_module_and_adam_go_on_as_if_never_stopped(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        return model, torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)

    def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum().backward()
        optimiser.step()

    model, adam = make()
    step(model, adam)
    save(tmp_path, {"model": model.state_dict(), "optim": adam.state_dict()}, fingerprint=RECIPE)
    back = load(tmp_path)
    assert same(adam.state_dict(), back["optim"])
    assert isinstance(model.state_dict(), OrderedDict)
    again, adam_again = make()
    again.load_state_dict(back["model"])
    adam_again.load_state_dict(back["optim"])
    for _ in range(3):
        step(model, adam)
        step(again, adam_again)
    assert same(model.state_dict(), dict(again.state_dict()))
    assert same(adam.state_dict(), adam_again.state_dict())


def test_a_folder_holds_one_checkpoint_that_is_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    for step in range(3):
        save(folder, {"step": step, "w": torch.full((3,), step)}, fingerprint=RECIPE)
        assert load(folder)["step"] == step
        assert files(folder) == pair(folder)
    sha256 = hashlib.sha256((folder / pair(folder)[0]).read_bytes()).hexdigest()
    assert pair(folder)[0] == f"checkpoint-{sha256[:12]}.safetensors"


def test_equal_tensors_share_a_name_and_survive_the_tidying(tmp_path: Path) -> None:
    for step in range(2):
        save(tmp_path, {"step": step, "w": torch.ones(3)}, fingerprint=RECIPE)
    assert same({"step": 1, "w": torch.ones(3)}, load(tmp_path))


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best.safetensors").write_text("a person's own")
    (tmp_path / "student.safetensors").write_text("what ships")
    save(tmp_path, {"w": torch.ones(3)}, fingerprint=RECIPE)
    assert files(tmp_path) == sorted([*pair(tmp_path), "checkpoint-best.safetensors", "student.safetensors"])


# Bad input


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (print, "builtin_function_or_method"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (Counter("aab"), "collections.Counter"),
        (torch.Size([2]), "torch.Size"),
        (torch.float32, "torch.dtype"),
        (torch.ones(1).numpy(), "numpy.ndarray"),
        (torch.ones(1).double().numpy()[0], "numpy.float64"),
        (signal.SIGKILL, "signal.Signals"),
        (torch.ones(2).to_sparse(), "sparse_coo"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_cannot_be_stored_is_named_by_its_path(tmp_path: Path, bad: object, kind: str) -> None:
    save(tmp_path, {"old": 1}, fingerprint=RECIPE)
    with refused("state['optim'][3][0]['fn']", kind):
        save(tmp_path, {"ok": 1, "optim": {3: [{"fn": bad}]}}, fingerprint=RECIPE)
    assert load(tmp_path) == {"old": 1}


@pytest.mark.parametrize("key", [1.5, None, True, (1,)], ids=str)
def test_a_key_that_cannot_be_stored_is_named_with_its_place(tmp_path: Path, key: object) -> None:
    with refused("state['optim']", repr(key), type(key).__name__, "str or int"):
        save(tmp_path, {"optim": {key: 1}}, fingerprint=RECIPE)


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["me"] = [state]
    with refused(tmp_path, "holds itself"):
        save(tmp_path, state, fingerprint=RECIPE)


def test_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with refused(folder / "checkpoint.json", "No such file", "a checkpoint", "start afresh"):
            load(folder)


def test_a_truncated_json_is_refused_at_every_length(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)}, fingerprint=RECIPE)
    note = tmp_path / "checkpoint.json"
    text = note.read_bytes()
    for length in range(len(text)):
        note.write_bytes(text[:length])
        with refused(note, "broken JSON"):
            load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, "\xff"])
def test_json_that_is_no_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text, encoding="latin-1")
    with refused(tmp_path / "checkpoint.json", "JSON", "a checkpoint"):
        load(tmp_path)


def test_a_flipped_byte_in_the_json_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    state = {"step": 41, "rate": 0.5, "best": float("inf"), 3: (True, None, "abc"), "w": torch.arange(3)}
    save(tmp_path, state, fingerprint="0123456789ab")
    note = tmp_path / "checkpoint.json"
    text = note.read_bytes()
    refusals = 0
    for place in range(len(text)):
        for bit in (1, 4, 32):
            note.write_bytes(text[:place] + bytes([text[place] ^ bit]) + text[place + 1 :])
            try:
                back = load(tmp_path, fingerprint="0123456789ab")
            except Refused:
                refusals += 1
            else:
                assert same(state, back), note.read_text()
    assert refusals >= 3 * len(text) - 10, "only a flip that leaves the same JSON may pass"


@pytest.mark.parametrize(
    "change",
    [{"tree": {"dict": []}}, {"tree_sha256": None}, {"file": "../other"}, {"sha256": 3}, {"more": 1}],
)
def test_a_checkpoint_json_that_was_changed(tmp_path: Path, change: dict[str, Any]) -> None:
    save(tmp_path, {"step": 41}, fingerprint=RECIPE)
    note = tmp_path / "checkpoint.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | change))
    with refused(note, "checksums", "restore it"):
        load(tmp_path)


def test_the_tensors_file_is_missing(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)}, fingerprint=RECIPE)
    tensors = tmp_path / pair(tmp_path)[0]
    tensors.unlink()
    with refused(tensors, "No such file", "checkpoint.json", "restore it"):
        load(tmp_path)


def test_a_flipped_bit_in_the_tensors_file(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)}, fingerprint=RECIPE)
    tensors = tmp_path / pair(tmp_path)[0]
    data = tensors.read_bytes()
    for place in range(len(data)):
        tensors.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with refused(tensors, "sha256", hashlib.sha256(data).hexdigest()[:12], "restore it"):
            load(tmp_path)


def test_the_checkpoint_of_another_recipe(tmp_path: Path) -> None:
    save(tmp_path, {"step": 1}, fingerprint=RECIPE)
    with refused(tmp_path / "checkpoint.json", RECIPE[:12], "fedcba987654", "another folder"):
        load(tmp_path, fingerprint="fedcba9876543210")
    assert load(tmp_path, fingerprint=None) == load(tmp_path, fingerprint=RECIPE) == {"step": 1}


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version(tmp_path: Path, version: object) -> None:
    save(tmp_path, {"step": 1}, fingerprint=RECIPE)
    note = tmp_path / "checkpoint.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"format": version}))
    with refused(note, f"format version {version!r}", "version 1", "the limbeck that wrote it"):
        load(tmp_path)


# Whole or not at all

CALLS = ("replace", "fsync", "unlink")  # the system calls between which a kill can fall


@contextmanager
def before_each_call(act: Callable[[int], None]) -> Iterator[None]:
    """Calls act(0), act(1) … before each system call that changes the disk."""
    count = 0

    def announced(call: Callable[..., Any]) -> Callable[..., Any]:
        def announce(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            act(count - 1)
            return call(*args, **named)

        return announce

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, announced(getattr(os, name)))
        yield


def photographs(folder: Path, album: Path, act: Callable[[], None]) -> list[Path]:
    """What a kill -9 before each system call of `act` leaves, whole and with its temporaries torn."""
    photos: list[Path] = []

    def photograph(_: int) -> None:
        whole, torn = album / f"{len(photos)}", album / f"{len(photos) + 1}"
        shutil.copytree(folder, whole)
        shutil.copytree(folder, torn)
        for partial in torn.glob("*.partial"):
            partial.write_bytes(partial.read_bytes()[: partial.stat().st_size // 2])
        photos.extend([whole, torn])

    with before_each_call(photograph):
        act()
    return photos


def test_a_kill_before_any_system_call_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old, new, next_one = ({"step": step, "w": torch.full((9,), step)} for step in range(3))
    save(folder, old, fingerprint=RECIPE)
    photos = photographs(folder, tmp_path / "album", lambda: save(folder, new, fingerprint=RECIPE))
    steps = []
    for photo in photos:
        back = load(photo, fingerprint=RECIPE)
        steps.append(back["step"])
        assert same([old, new][back["step"]], back)
        save(photo, next_one, fingerprint=RECIPE)
        assert same(next_one, load(photo))
        assert files(photo) == pair(photo), "leftovers stay"
    assert steps == sorted(steps) and set(steps) == {0, 1}


def test_a_failed_call_leaves_a_checkpoint_and_the_next_save_leaves_no_stray(tmp_path: Path) -> None:
    old, new, next_one = ({"step": step, "w": torch.full((9,), step)} for step in range(3))
    outcomes = []
    for failing in range(9):
        folder = tmp_path / str(failing)
        save(folder, old, fingerprint=RECIPE)

        def fail(call: int, failing: int = failing) -> None:
            if call == failing:
                raise OSError(28, "No space left on device")

        said = ""
        with before_each_call(fail):
            try:
                save(folder, new, fingerprint=RECIPE)
            except Refused as error:
                said = str(error)
        back = load(folder)
        assert same([old, new][back["step"]], back)
        assert not list(folder.glob("*.partial"))
        outcomes.append((back["step"], "checkpoint.json: found" in said and "No space left" in said))
        save(folder, next_one, fingerprint=RECIPE)
        assert same(next_one, load(folder)) and files(folder) == pair(folder)
    # Two files are brought to the disk, then each is renamed and its folder brought to the disk; the last of
    # these six calls comes after the commit. The others tidy up, and their failing is no failure of the save.
    assert outcomes == [(0, True)] * 5 + [(1, True)] + [(1, False)] * 3


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The kernel lets no file grow beyond `room` bytes: a real OSError in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("big", [torch.ones(100_000), "x" * 300_000], ids=["tensors", "json"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, big: object) -> None:
    save(tmp_path, {"old": torch.ones(3)}, fingerprint=RECIPE)
    before = files(tmp_path)
    with refused(tmp_path / "checkpoint.json", "cannot be written", "free some"), full_disk(room=100_000):
        save(tmp_path, {"big": big}, fingerprint=RECIPE)
    assert files(tmp_path) == before
    assert same({"old": torch.ones(3)}, load(tmp_path))


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with refused(tmp_path / "run" / "checkpoint.json", "cannot be written", "another folder"):
        save(tmp_path / "run", {}, fingerprint=RECIPE)


LOOP = """
import sys, torch
from pathlib import Path
from limbeck.checkpoint import save
torch.set_num_threads(1)
for step in range(1, 100_000):
    state = {"step": step, "layers": [torch.full((20_000 + 500 * step,), step) for _ in range(3)]}
    save(Path(sys.argv[1]), state, fingerprint="loop")
    print(step, flush=True)
"""


def test_kill_minus_9_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(9)
    folders = [tmp_path / str(kill) for kill in range(3)]
    with ExitStack() as running:
        loops = []
        for folder in folders:
            loop = subprocess.Popen(
                [sys.executable, "-c", LOOP, str(folder)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
            running.enter_context(loop)
            running.callback(loop.kill)
            loops.append(loop)
        for loop, folder in zip(loops, folders, strict=True):
            assert loop.stdout
            told = [int(loop.stdout.readline()) for _ in range(moments.randint(2, 12))]
            time.sleep(moments.uniform(0, 0.01))  # only to fall elsewhere inside a save: any moment will do
            loop.kill()
            told += [int(line) for line in loop.stdout]
            assert loop.wait() == -signal.SIGKILL
            state = load(folder, fingerprint="loop")
            step = state["step"]
            assert step in (told[-1], told[-1] + 1), "a save that returned is on the disk"
            assert same([torch.full((20_000 + 500 * step,), step)] * 3, state["layers"])
            save(folder, state, fingerprint="loop")
            assert files(folder) == pair(folder)


def test_write_atomic_writes_all_or_leaves_all(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "run.json"
    write_atomic(path, b"old")
    for call in range(3):

        def fail(count: int, call: int = call) -> None:
            if count == call:
                raise OSError("boom")

        with refused(path, "boom", "cannot be written"), before_each_call(fail):
            write_atomic(path, b"new")
        assert path.read_bytes() == (b"new" if call == 2 else b"old")  # the third is after the rename
        assert files(path.parent) == ["run.json"]
    write_atomic(path, b"")
    assert path.read_bytes() == b""


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Weights


def test_weights_are_plain_safetensors_with_a_json_that_tells(tmp_path: Path) -> None:
    path = tmp_path / "student.v1.safetensors"
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].weight = model[0].bias  # tied
    weights = model.state_dict()
    save_weights(path, weights, {"method": "rkd", "score": 0.5})
    for back in (safetensors.torch.load_file(path), load_weights(path)):
        assert same(dict(sorted(weights.items())), dict(sorted(back.items())))
    told = json.loads((tmp_path / "student.v1.json").read_text())
    data = path.read_bytes()
    assert told["about"] == {"method": "rkd", "score": 0.5}
    assert (told["sha256"], told["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert told["tensors"]["0.weight"] == {"dtype": "float32", "shape": [4, 3, 1, 1]}
    assert told["tensors"]["1.num_batches_tracked"] == {"dtype": "int64", "shape": []}
    assert told["tensors"].keys() == weights.keys()


def test_weights_without_a_json_load_unchecked(tmp_path: Path) -> None:
    path = tmp_path / "hub.safetensors"
    safetensors.torch.save_file({"w": torch.arange(3)}, path)
    assert same({"w": torch.arange(3)}, load_weights(path))


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_weights_that_begin_like_a_pickle_load(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "w.safetensors"
    for length in range(1, 20_000):
        tensors = {"w" * length: torch.arange(3)}
        if length % 8 == 1 and (data := safetensors.torch.save(tensors)).startswith(start):
            break
    path.write_bytes(data)
    assert data.startswith(start) and same(tensors, load_weights(path))


def test_a_kill_while_saving_weights_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s.safetensors"
    old, new = {"w": torch.zeros(5)}, {"w": torch.ones(5)}
    save_weights(path, old, {"step": 0})
    photos = photographs(path.parent, tmp_path / "album", lambda: save_weights(path, new, {"step": 1}))
    seen = []
    for photo in photos:
        back = load_weights(photo / "s.safetensors")
        assert same(old, back) or same(new, back)
        seen.append(same(new, back))
        save_weights(photo / "s.safetensors", old, {"step": 2})
        assert files(photo) == ["s.json", "s.safetensors"]
    assert seen == sorted(seen) and set(seen) == {False, True}


def test_a_full_disk_leaves_weights_and_json_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_weights(path, {"w": torch.zeros(5)}, {"step": 0})
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for weights, about in [({"w": torch.ones(100_000)}, {}), ({"w": torch.ones(2)}, {"text": "x" * 300_000})]:
        with refused(path, "cannot be written"), full_disk(room=100_000):
            save_weights(path, weights, about)
        assert before == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["teacher.pt", "teacher.pth", "teacher.safetensors"])
def test_a_torch_pickle_is_refused_unopened(tmp_path: Path, name: str, write: str) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    value = {"w": torch.ones(2), "trap": Trap(sprung)}
    match write:
        case "zip":
            torch.save(value, path)
        case "legacy":
            torch.save(value, path, _use_new_zipfile_serialization=False)
        case "pickle":
            path.write_bytes(pickle.dumps(value["trap"]))
    with refused(path, "pickle", "safetensors.torch.save_file"):
        load_weights(path)
    assert not sprung.exists()


@pytest.mark.parametrize("data", [b"", b"not weights at all", b"\x08" + b"\0" * 7 + b"{broken}"])
def test_a_file_that_is_not_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with refused(path, "unreadable contents", "safetensors", "write it again"):
        load_weights(path)


def test_a_dtype_torch_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, path)
    with refused(path, "F8_E8M0"):
        load_weights(path)


def test_arrays_of_numpy_are_weights_too(tmp_path: Path) -> None:
    arrays = {"conv.weight": np.arange(6.0, dtype=np.float32).reshape(2, 3), "steps": np.array(7)}
    np.savez(tmp_path / "w.npz", **arrays)  # type: ignore[arg-type]
    found = load_weights(tmp_path / "w.npz")
    assert same({name: torch.from_numpy(array) for name, array in arrays.items()}, found)


@pytest.mark.parametrize("trouble", ["objects", "cut", "text"])
def test_arrays_that_cannot_be_weights(tmp_path: Path, trouble: str) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, w=np.array([{}], dtype=object) if trouble == "objects" else np.ones(9))
    if trouble == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    if trouble == "text":
        path.write_text("no archive")
    found = "an array of Python objects" if trouble == "objects" else "contents that are no zip archive"
    with refused(path, found, ".npz of plain arrays", "numpy.savez"):
        load_weights(path)


def test_numpys_advice_to_unpickle_is_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    for write in (lambda: path.write_bytes(b"\x80garbage"), lambda: np.savez(path, w=np.array([{}]))):
        write()
        with pytest.raises(Refused) as caught:
            load_weights(path)
        assert "allow_pickle" not in str(caught.value)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with refused(tmp_path / "w.safetensors", "No such file", "correct the path"):
        load_weights(tmp_path / "w.safetensors")


def test_weights_that_differ_from_their_json(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.ones(2)}, {})
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with refused(path, "sha256", "remove the JSON"):
            load_weights(path)


@pytest.mark.parametrize(("text", "found"), [("{", "broken JSON"), ("[]", "list"), ('{"a": 1}', "no sha256")])
def test_a_json_that_does_not_tell_about_the_weights(tmp_path: Path, text: str, found: str) -> None:
    save_weights(tmp_path / "w.safetensors", {"w": torch.ones(2)}, {})
    (tmp_path / "w.json").write_text(text)
    with refused(tmp_path / "w.json", found, "remove the JSON"):
        load_weights(tmp_path / "w.safetensors")


def test_weights_that_cannot_be_saved(tmp_path: Path) -> None:
    path, weights = tmp_path / "w.safetensors", {"w": torch.ones(2)}
    with refused(tmp_path / "w.pt", "'.pt'", "'.safetensors'"):
        save_weights(tmp_path / "w.pt", weights, {})
    with refused("state_dict['fn']", "builtin_function_or_method"):
        save_weights(path, {"fn": print}, {})  # type: ignore[dict-item]
    for about in ({"score": float("nan")}, {"fn": print}):
        with refused(tmp_path / "w.json", "`about`", "finite numbers"):
            save_weights(path, weights, about)
    assert files(tmp_path) == []
