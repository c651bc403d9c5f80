"""No recipe at all: a teacher, a student, data, and sane defaults for the rest. What was chosen is written
out as a board that anybody can read, change and run again.

The choices, and why:

- `kd` at temperature 4: it asks nothing of the two networks but the same classes, and in the fair comparisons
  it is hard to beat.
- a control, always: the same student, seeds, order of batches and budget, without a teacher.
- convolutional networks learn by SGD (0.05, cosine, weight decay 5e-4), networks without BatchNorm by AdamW
  (1e-3, cosine, 0.05).
- colour images are cropped and mirrored at random; grey ones, which are often characters, are not.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from limbeck import build, checkpoint, recipe, registry
from limbeck.board import Board
from limbeck.core.refused import Refused

SGD = {"name": "sgd", "lr": 0.05, "schedule": "cosine"}
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": "cosine"}
KD = {"method": "kd", "temperature": 4.0, "teacher": "teacher"}
MARK = (".safetensors", ".npz")


def plan(
    teacher: str, student: str, data: str, *, epochs: int = 30, batch: int = 64, labels: int | None = None
) -> recipe.Recipe:
    """The recipe of a distillation with every default chosen.

    Args:
        teacher: weights that limbeck wrote (their JSON says which network), `NAME=weights.safetensors`, or
            the name of a network, which is then trained first, on all labels.
        student: the name of a network. data: the name of a data set, or a folder of images,
            `root/class/image`.
        labels: how many labels the student gets; None means all.

    Raises `Refused` when a name is not known, a file not there, or the weights do not say whose they are.
    """
    networks = {"teacher": _teacher(teacher), "student": _network(student)}
    stage: dict[str, Any] = {"epochs": epochs, "batch": batch}
    stages = [{"learner": "student", **stage, "terms": [KD]} | ({} if labels is None else {"labels": labels})]
    if "weights" not in networks["teacher"]:
        stages.insert(0, {"learner": "teacher", **stage})
    content = {"data": _data(data), "models": networks, "stages": stages}
    lab = build.lab(recipe.parse(content, "the plan"))
    colour = lab.splits.train.x.ndim == 4 and lab.splits.train.x.shape[1] == 3
    for one in stages:
        one["augment"] = ["crop", "flip"] if colour else []
        one["optim"] = {"student": _optimiser(lab.models[one["learner"]])}
    return recipe.parse(content, "the plan")


def folder(teacher: str, student: str, data: str) -> Path:
    """Where it is done if nothing else is said: what is distilled of other names has another folder."""
    return Path("runs") / "distill" / quote("-".join(called(teacher, student, data)), safe=" ")


def called(teacher: str, student: str, data: str) -> tuple[str, str, str]:
    """Student, teacher and data in short: files and folders without their way."""
    who = Path(teacher).stem if teacher.endswith(MARK) else teacher
    return student, who, Path(data).resolve().name if Path(data).is_dir() else data


def ship(board: Board) -> tuple[str, int, Path]:
    """Hand back the plain small network, as `student.safetensors` in the board's folder: of the arm that did
    best on the validation split over all seeds, the control included and without those that diverged, its
    best seed there. Returns arm, seed and file."""
    metric = f"valid.{board.headline}"
    scores: dict[str, dict[int, float]] = {}
    for cell in board.cells():
        if cell.arm in board.ended:
            scores.setdefault(cell.arm, {})[cell.seed] = board.scores(cell)[metric]
    arm = max(scores, key=lambda name: sum(scores[name].values()))
    seed = max(scores[arm], key=lambda one: scores[arm][one])
    kept = board.folder / f"{board.plans[arm].stages[-1].learns}.safetensors"
    for end in (".json", ".safetensors"):
        there = board.cell_folder(arm, seed) / kept.with_suffix(end).name
        checkpoint.write_atomic(kept.with_suffix(end), there.read_bytes())
    return arm, seed, kept


def _data(data: str) -> dict[str, Any]:
    if data in registry.names("data") or ":" in data:
        return {"name": data}
    if Path(data).is_dir():
        return {"name": "image-folder", "root": data}
    raise Refused(
        f"'{data}' is neither a folder nor a data set limbeck knows ({', '.join(registry.names('data'))}); "
        "give a folder with a folder of images for each class."
    )


def _teacher(teacher: str) -> dict[str, Any]:
    name, equals, weights = teacher.partition("=")
    if equals:
        return {**_network(name), "weights": weights}
    if not teacher.endswith(MARK):
        return _network(teacher)
    note = Path(teacher).with_suffix(".json")
    try:
        about = json.loads(note.read_text(encoding="utf-8"))["about"]
        net = about["recipe"]["models"][about["learner"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(
            f"{teacher} does not say which network its weights belong to (no {note.name} of limbeck's is "
            f"beside it); say it as NAME={teacher}, for example resnet56={teacher}."
        ) from None
    return {**net, "weights": teacher}


def _network(name: str) -> dict[str, Any]:
    registry.find("model", name)
    return {"name": name}


def _optimiser(network: nn.Module) -> dict[str, Any]:
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    return dict(SGD if normed else ADAMW)
