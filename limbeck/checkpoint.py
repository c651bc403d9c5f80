"""A state on disk: whole or not at all, checked on the way back, never pickled.

A checkpoint is two files in one folder: the tensors, in a safetensors file named after its own sha256, and
`checkpoint.json`, which holds everything else and names that file. The JSON is the commit point: until it is
renamed into place the old pair is the checkpoint, from then on the new pair is, so a kill at any moment
leaves one of the two. One process at a time writes to a folder.
"""

import hashlib
import io
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from limbeck.core.refused import Refused

FORMAT = 1
NOTE = "checkpoint.json"
TENSORS = re.compile(r"checkpoint-[0-9a-f]{12}\.safetensors(\.partial)?")
TEXTS = {"fingerprint", "file", "sha256", "tree_sha256"}
RESTORE = "restore it from a copy or start again"

# What safetensors can read back as well as write.
DTYPES = {
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
}  # fmt: skip


def save(folder: Path, state: object, *, fingerprint: str) -> None:
    """Makes `state` the folder's checkpoint; `fingerprint` names the recipe it belongs to.

    A state nests dicts (keys str or int), lists, tuples, None, bool, int, float, str and tensors of any
    shape. Raises `Refused` for anything else, naming its path, and when the disk does not take it; the
    checkpoint that was there still loads then.
    """
    tensors: dict[str, Tensor] = {}
    try:
        tree = _to_tree(state, "state", tensors)
        tree_sha256 = _sha256(_json(tree))
    except RecursionError as error:
        found = "a state that holds itself or is hundreds of levels deep"
        raise _refusal(folder, found, "a tree", "save the parts it is made of") from error
    data = safetensors.torch.save(tensors)
    sha256 = _sha256(data)
    file, note = folder / _tensors_name(sha256), folder / NOTE
    texts = {"fingerprint": fingerprint, "file": file.name, "sha256": sha256, "tree_sha256": tree_sha256}
    with _writing(note, file):
        _stage(file, data)
        _stage(note, _json({"format": FORMAT, **texts, "tree": tree}))
        _commit(file)
        _commit(note)
    with suppress(OSError):  # the new checkpoint is safe; what cannot be removed now, the next save removes
        for other in folder.iterdir():
            if TENSORS.fullmatch(other.name) and other != file:
                other.unlink()


def load(folder: Path, *, fingerprint: str | None = None) -> Any:
    """The state that was saved there, equal in every type and bit, its tensors contiguous on the CPU.

    Raises `Refused` when there is none, when a file is damaged, and when the checkpoint was made under
    another fingerprint (None accepts any).
    """
    note = folder / NOTE
    commit = _read_json(note, "a checkpoint", "start afresh or name the folder of a run that saved one")
    version = commit.get("format")
    if version != FORMAT:
        fix = "load it with the limbeck that wrote it"
        raise _refusal(note, f"format version {version!r}", f"version {FORMAT}", fix)
    if (
        commit.keys() != TEXTS | {"format", "tree"}
        or any(not isinstance(commit[name], str) for name in TEXTS)
        or commit["file"] != _tensors_name(commit["sha256"])
        or commit["tree_sha256"] != _sha256(_json(commit["tree"]))
    ):
        raise _refusal(note, "contents its own checksums deny", "the file as saved", RESTORE)
    made_by = commit["fingerprint"]
    if fingerprint is not None and fingerprint != made_by:
        fix = "resume with the recipe that made it or choose another folder"
        raise _refusal(note, f"a checkpoint of recipe {made_by[:12]}", f"recipe {fingerprint[:12]}", fix)
    file = folder / commit["file"]
    data = _read(file, f"the tensors that {NOTE} names", RESTORE)
    _check_sha256(file, data, commit["sha256"], RESTORE)
    return _from_tree(commit["tree"], safetensors.torch.load(data))


def save_weights(path: Path, state_dict: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes plain safetensors that anyone can load and, beside it, a JSON that says what they are.

    The JSON holds `about`, the sha256, the size in bytes, and each tensor's dtype and shape. Raises `Refused`
    for what safetensors or JSON cannot hold, and when the disk does not take it.
    """
    if path.suffix != ".safetensors":
        raise _refusal(path, f"the suffix {path.suffix!r}", "'.safetensors'", "rename it")
    tensors = {name: _copied(tensor, f"state_dict[{name!r}]") for name, tensor in state_dict.items()}
    data = safetensors.torch.save(tensors)
    shapes = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }
    summary = {"about": about, "sha256": _sha256(data), "bytes": len(data), "tensors": shapes}
    note = path.with_suffix(".json")
    try:
        text = json.dumps(summary, indent=2, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        expected = "dicts, lists, str, bool, None and finite numbers"
        raise _refusal(note, f"an `about` that JSON cannot hold ({error})", expected, "convert it") from error
    with _writing(path, note):
        _stage(path, data)
        _stage(note, text)
        # Killed between the two renames, new weights must not lie beside an old sha256.
        note.unlink(missing_ok=True)
        _commit(path)
        _commit(note)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, checked against the JSON beside it, if any; or
    the arrays of a NumPy `.npz`.

    Raises `Refused` when the file is missing, damaged or neither; a pickle is never opened.
    """
    data = _read(path, "a safetensors file", "correct the path")
    if path.suffix == ".npz":
        return _arrays(path, data)
    # The first bytes of safetensors are a count that may look like a pickle's; "{" always follows it.
    if data.startswith((b"PK", b"\x80")) and data[8:9] != b"{":
        found = "a pickle as torch.save writes it (opening one can run any code)"
        fix = "if you trust it, load it yourself and write it with safetensors.torch.save_file"
        raise _refusal(path, found, "safetensors", fix)
    note = path.with_suffix(".json")
    if note.exists():
        fix = "save the weights again, or remove the JSON to load them unchecked"
        sha256 = _read_json(note, "a JSON about the weights", fix).get("sha256")
        if not isinstance(sha256, str):
            raise _refusal(note, "no sha256", f"that of {path.name}", fix)
        _check_sha256(path, data, sha256, fix)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that cannot be read
        fix = "write it again with safetensors.torch.save_file"
        raise _refusal(path, f"unreadable contents ({error})", "safetensors", fix) from error


def _arrays(path: Path, data: bytes) -> dict[str, Tensor]:
    """What a `.npz` holds; arrays of Python objects, which are pickles, are refused."""
    fix = "write it again with numpy.savez, or as safetensors"
    if not is_zipfile(io.BytesIO(data)):
        raise _refusal(path, "contents that are no zip archive", "a .npz of plain arrays", fix)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, EOFError, KeyError, OSError, BadZipFile, zlib.error) as error:
        # numpy's own words would have you unpickle it.
        pickled = "allow_pickle" in str(error)
        found = "an array of Python objects, a pickle" if pickled else f"unreadable contents ({error})"
        raise _refusal(path, found, "a .npz of plain arrays", fix) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Makes `data` the file's contents: anyone who looks, ever, finds the old ones or the new, never a part.

    Missing folders are made. Raises `Refused` when the disk does not take it; the old contents stay then.
    """
    with _writing(path):
        _stage(path, data)
        _commit(path)


@contextmanager
def _writing(*paths: Path) -> Iterator[None]:
    """Around staging and committing: no temporary outlives it, and an OSError becomes a sentence."""
    try:
        yield
    except OSError as error:
        found = f"that it cannot be written ({error.strerror or error})"
        fix = "free some space or choose another folder; what was saved before is still there"
        raise _refusal(paths[0], found, "a writable folder with room", fix) from error
    finally:
        for path in paths:
            with suppress(OSError):
                _partial(path).unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _stage(path: Path, data: bytes) -> None:
    """Brings the bytes onto the disk under a temporary name, so that a full disk is met before any rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(_partial(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _commit(path: Path) -> None:
    os.replace(_partial(path), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _to_tree(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it, unmistakably; its tensors go to `tensors`, each named by its path.

    Types must match exactly: a subclass (a Counter, a numpy float) would come back as something else.
    """
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:  # other JSON readers round long integers, and Python limits their digits
        return value if abs(value) < 2**53 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind in (list, tuple):
        items = [_to_tree(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):  # the second is what a module's state_dict() is
        for key in value:
            if type(key) not in (str, int):
                raise _refusal(where, f"the key {key!r} of type {_name(key)}", "str or int", "convert it")
        pairs = [
            [_to_tree(key, where, tensors), _to_tree(item, f"{where}[{key!r}]", tensors)]
            for key, item in value.items()
        ]
        return {"dict": pairs}
    tensors[where] = _copied(value, where)
    return {"tensor": where}


def _from_tree(node: Any, tensors: dict[str, Tensor]) -> Any:
    match node:
        case list():
            return [_from_tree(item, tensors) for item in node]
        case {"int": digits}:
            return int(digits, 16)
        case {"float": name}:
            return float(name)
        case {"tuple": items}:
            return tuple(_from_tree(item, tensors) for item in items)
        case {"dict": pairs}:
            return {_from_tree(key, tensors): _from_tree(item, tensors) for key, item in pairs}
        case {"tensor": where}:
            return tensors[where]
    return node


def _copied(value: Any, where: str) -> Tensor:
    """A contiguous copy on the CPU: safetensors takes neither strides nor memory that tensors share."""
    if type(value) not in (Tensor, nn.Parameter):
        expected = "a dict, list, tuple, None, bool, int, float, str or plain Tensor"
        raise _refusal(where, f"a {_name(value)}", expected, "convert it or leave it out")
    if value.layout is not torch.strided or value.is_meta or value.dtype not in DTYPES:
        found = f"a Tensor ({value.dtype}, {value.layout}, on {value.device})"
        raise _refusal(where, found, "a dense one with data and a dtype safetensors reads", "convert it")
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _tensors_name(sha256: str) -> str:
    return f"checkpoint-{sha256[:12]}.safetensors"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_sha256(path: Path, data: bytes, expected: str, fix: str) -> None:
    found = _sha256(data)
    if found != expected:
        raise _refusal(path, f"changed contents (sha256 {found[:12]})", f"sha256 {expected[:12]}", fix)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _read(path: Path, expected: str, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refusal(path, f"that it cannot be read ({error.strerror})", expected, fix) from error


def _read_json(path: Path, expected: str, fix: str) -> dict[str, Any]:
    data = _read(path, expected, fix)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"broken JSON ({error})", expected, fix) from error
    if not isinstance(value, dict):
        raise _refusal(path, f"a JSON {type(value).__name__}", expected, fix)
    return value


def _refusal(thing: object, found: str, expected: str, fix: str) -> Refused:
    return Refused(f"{thing}: found {found}, expected {expected}; {fix}")
