"""What networks said of the test split: kept when it is scored, and all that a board later asks of it.

The answers are written beside the weights and read back for the page, so that its per-class, calibration and
agreement figures cost no second look at the test split.
"""

import base64
import math
import statistics
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from limbeck import checkpoint
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.task import Task
from limbeck.data.loader import Data

BINS = 15
SHOWN, ALIKE = 6, 2  # samples of each kind, and of one class among them
PIXELS = 64  # the longer side of a sample's picture

Bin = tuple[int, float, float]
"""Labelled rows in a bin of confidence, their mean confidence, their accuracy."""
EMPTY: Bin = (0, 0.0, 0.0)


@dataclass(frozen=True)
class Answers:
    """Logits (n k) and labels (n) of a whole split, in its order; `-100` where nobody labelled a row."""

    z: Float[Tensor, "n k"]
    y: Int[Tensor, " n"]

    @cached_property
    def p(self) -> Float[Tensor, "n k"]:
        return self.z.double().softmax(1)

    @cached_property
    def right(self) -> Tensor:
        """Whether the most probable class is the labelled one; never for a row without a label."""
        return self.z.argmax(1) == self.y

    @property
    def labelled(self) -> Tensor:
        return self.y != IGNORE


class Kept(Task):
    """A task that also keeps the answers it scores, where they are class scores of single labels."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._heard: list[tuple[Tensor, Tensor]] = []

    def loss(self, s: Seen, batch: Batch) -> Tensor:
        return self.task.loss(s, batch)

    def check(self, s: Seen, batch: Batch) -> None:
        self.task.check(s, batch)

    def score(self, answers: Iterable[tuple[Seen, Batch]]) -> dict[str, float]:
        self._heard = []
        heard = self._listening(answers) if getattr(self.task, "headline", "") == "accuracy" else answers
        return self.task.score(heard)

    def answers(self) -> Answers | None:
        """What the last `score` heard; None for a task that does not tell classes apart."""
        if not self._heard:
            return None
        z, y = (torch.cat(parts) for parts in zip(*self._heard, strict=True))
        fits = z.ndim == 2 and y.shape == z.shape[:1] and bool((y < z.shape[1]).all())
        return Answers(z, y) if fits and bool((y != IGNORE).any()) else None

    def _listening(self, answers: Iterable[tuple[Seen, Batch]]) -> Iterator[tuple[Seen, Batch]]:
        for seen, batch in answers:
            if isinstance(seen.out, Tensor) and isinstance(batch.y, Tensor):
                self._heard.append((seen.out.detach().float().cpu(), batch.y.cpu()))
            yield seen, batch


def place(folder: Path, name: str) -> Path:
    """Where a folder keeps the answers of the model `name`."""
    return folder / f"answers-{name}.safetensors"


def write(path: Path, answers: Answers | None, about: Mapping[str, Any]) -> None:
    """Keep answers, if there are any. Logits go in half precision, less each row's largest: softmax is the
    same, and rounding cannot make another class the largest."""
    if answers is None:
        return
    less = (answers.z - answers.z.amax(1, keepdim=True)).clamp(min=torch.finfo(torch.float16).min)
    checkpoint.save_weights(path, {"logits": less.half(), "labels": answers.y}, dict(about))


def read(path: Path) -> Answers | None:
    """The answers that were kept there; None when none were. Raises `Refused` when they are damaged."""
    if not path.exists():
        return None
    kept = checkpoint.load_weights(path)
    if kept.keys() != {"logits", "labels"}:
        raise Refused(
            f"{path} holds {', '.join(sorted(kept)) or 'nothing'}, expected logits and labels; restore it "
            "from a copy, or remove it (the page then leaves out what is made from it)."
        )
    return Answers(kept["logits"].float(), kept["labels"])


# --- what they come to ---


def by_class(a: Answers) -> list[float]:
    """Accuracy in percent of each class' rows; NaN for a class that has none."""
    classes = range(a.z.shape[1])
    return [100 * float(a.right[a.y == k].double().mean()) for k in classes]


def agreement(s: Answers, t: Answers) -> float:
    """Percent of the rows that both put in the same class."""
    return 100 * float((s.z.argmax(1) == t.z.argmax(1)).double().mean())


def divergence(s: Answers, t: Answers) -> float:
    r"""Mean $\mathrm{KL}(t \Vert s)$ over the rows, in nats, at temperature 1."""
    logs = (s.z.double().log_softmax(1), t.z.double().log_softmax(1))
    return float(F.kl_div(*logs, reduction="batchmean", log_target=True))


def calibration(a: Answers) -> list[Bin]:
    """All 15 bins of equal width, empty ones too; a bin takes confidences above its lower edge, up to and
    with its upper one (Guo et al. 2017; arXiv:1706.04599)."""
    confidence, right = a.p.amax(1)[a.labelled], a.right[a.labelled].double()
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    bin_ = torch.bucketize(confidence, edges)
    inside = [bin_ == n for n in range(BINS)]
    return [
        (int(rows.sum()), float(confidence[rows].mean()), float(right[rows].mean())) if rows.any() else EMPTY
        for rows in inside
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """ECE in points: how far confidence and accuracy of a bin are apart, in the mean over rows."""
    rows = sum(many for many, _, _ in bins)
    return 100 * sum(many * abs(sure - right) for many, sure, right in bins) / rows


def pooled(several: Sequence[Sequence[Bin]]) -> list[Bin]:
    """The bins of several seeds as those of one: counts add up, means are over all rows."""
    bins = []
    for same in zip(*several, strict=True):
        many = sum(n for n, _, _ in same)
        sure, right = (sum(one[0] * one[k] for one in same) for k in (1, 2))
        bins.append((many, sure / many, right / many) if many else EMPTY)
    return bins


def told(seeds: Sequence[Answers], control: Sequence[Answers], taught: Sequence[Answers]) -> dict[str, Any]:
    """What an arm's answers, one set a seed, say beside the control's and the teacher's (none: empty)."""
    bins = [calibration(one) for one in seeds]
    mine, theirs = ([by_class(one) for one in side] for side in (seeds, control))
    gaps = [[a - b for a, b in zip(*both, strict=True)] for both in zip(mine, theirs, strict=True)]
    pairs = list(zip(seeds, taught, strict=False))
    return {
        "by_class": [spread(column) for column in zip(*mine, strict=True)],
        "gaps": [spread(column) for column in zip(*gaps, strict=True)],
        "agreement": spread([agreement(s, t) for s, t in pairs]),
        "divergence": spread([divergence(s, t) for s, t in pairs]),
        "calibration_error": spread([calibration_error(one) for one in bins]),
        "bins": [list(one) for one in pooled(bins)],
    }


def spread(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and standard deviation (None for a single value); None of nothing, or of what is no number."""
    if not values or not all(map(math.isfinite, values)):
        return None
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


# --- samples to look at ---


def samples(
    arm: Sequence[Answers], control: Sequence[Answers], taught: Sequence[Answers], data: Data
) -> dict[str, Any]:
    """A few test samples of three kinds: where the arm is right in more seeds than the control, or in fewer,
    and where the teacher is least sure.

    Probabilities are means over the seeds. Ties are settled by the mean probability of the label, then by
    the order of the data.
    """
    y = arm[0].y
    rights = [torch.stack([one.right for one in side]).sum(0) for side in (arm, control)]
    ps = {"arm": arm, "control": control, **({"teacher": taught} if taught else {})}
    mean = {who: torch.stack([one.p for one in side]).mean(0) for who, side in ps.items()}
    label = y.clamp(min=0)[:, None]
    gain = (rights[0] - rights[1]) + (mean["arm"] - mean["control"]).gather(1, label)[:, 0] / 2
    won, lost = ((gap > 0).nonzero()[:, 0] for gap in (rights[0] - rights[1], rights[1] - rights[0]))
    chosen = {
        "won": _few(won[gain[won].argsort(descending=True, stable=True)], y),
        "lost": _few(lost[gain[lost].argsort(stable=True)], y),
    }
    if taught:
        doubt = torch.special.entr(mean["teacher"]).sum(1)
        free = y != IGNORE
        free[chosen["won"] + chosen["lost"]] = False
        rows = doubt.argsort(descending=True, stable=True)
        chosen["doubted"] = _few(rows[free[rows]], y)

    def one(row: int) -> dict[str, Any]:
        top = {who: p[row].topk(min(3, p.shape[1])) for who, p in mean.items()}
        return {
            "row": row,
            "label": int(y[row]),
            "image": picture(data.x[row], data.scale),
            "right": {"arm": int(rights[0][row]), "control": int(rights[1][row])},
            "said": {
                who: [[int(k), round(float(v), 4)] for k, v in zip(best.indices, best.values, strict=True)]
                for who, best in top.items()
            },
        }

    return {
        "won": len(won),
        "lost": len(lost),
        "groups": [{"kind": kind, "samples": [one(n) for n in rows]} for kind, rows in chosen.items()],
    }


def _few(rows: Tensor, y: Tensor) -> list[int]:
    """The first rows, not too many of one class."""
    few: list[int] = []
    for row in rows.tolist():
        if len(few) < SHOWN and sum(bool(y[row] == y[other]) for other in few) < ALIKE:
            few.append(row)
    return few


def picture(x: Tensor, scale: float = 1.0) -> str | None:
    """A sample (c h w; grey or colour) as a PNG in a data URI, at most 64 pixels a side; None for what is no
    picture. Values are `x * scale` in 0 … 1; what leaves that range is stretched to fit it."""
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        return None
    shown = x.detach().cpu().float() * scale
    longest = max(shown.shape[1:])
    if longest > PIXELS:
        high, wide = (max(1, round(side * PIXELS / longest)) for side in shown.shape[1:])
        shown = F.adaptive_avg_pool2d(shown, (high, wide))
    least, most = float(shown.min()), float(shown.max())
    if least < 0 or most > 1:
        shown = (shown - least) / max(most - least, 1e-12)
    grid = (shown * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return "data:image/png;base64," + base64.b64encode(_png(grid)).decode()


def _png(grid: Tensor) -> bytes:
    """Eight bits a channel, no filter; the three chunks that a PNG must have."""
    high, wide, channels = grid.shape
    lines = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in grid)
    header = struct.pack(">IIBBBBB", wide, high, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
