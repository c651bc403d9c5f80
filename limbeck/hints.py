"""A teacher's layers, clustered, and a picture of how alike they are: `limbeck hints`."""

import json
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from rich import box
from rich.table import Table
from rich.text import Text

from limbeck import build, checkpoint, distill, recipe
from limbeck.core.refused import Refused
from limbeck.core.teachers import Frozen
from limbeck.models.hints import Hints, hints

CELL, TOP, END = 22, 50, 40  # a square of the matrix, and what stands above and below it
PAPER, INK, SOFT, ARM = "#fcfcfa", "#1c1d1f", "#5c6066", "#1f5fbf"  # as in the report


def find(
    teacher: str,
    data: str | None = None,
    *,
    called: str = "teacher",
    count: int = 3,
    metric: str = "r2_cca",
    centre: bool = True,
    update: str = "paper",
    samples: int | None = None,
    device: str = "cpu",
) -> Hints:
    """The layers of a trained network that give hints.

    teacher: a recipe whose network `called` has weights; or, with `data`, weights as in `limbeck distill`.
    The rest as in `limbeck.models.hints.hints`. Raises `Refused`.
    """
    if teacher.endswith(".toml"):
        plan = recipe.read(Path(teacher), () if data is None else (f"data={json.dumps(data)}",))
    elif not teacher.endswith(distill.MARK):
        raise Refused(
            f"'{teacher}' is neither a recipe (.toml) nor weights ({' or '.join(distill.MARK)}); give "
            "weights that limbeck wrote, or NAME=WEIGHTS."
        )
    elif data is None:
        raise Refused(f"{teacher} is to be looked at with images; give a data set or a folder as --data.")
    else:
        plan, called = distill.plan(teacher, "cnn", data), "teacher"  # nobody asks that plan's student
    spec = plan.models.get(called)
    if not isinstance(spec, recipe.Net) or spec.weights is None:
        raise Refused(
            f"'{called}' in {teacher} is no network with weights, so its layers have nothing to show; run "
            f"the recipe, and give what it wrote: limbeck hints runs/NAME/{called}.safetensors --data DATA"
        )
    lab = build.lab(plan, device=device)
    network = lab.teacher(called)
    assert isinstance(network, Frozen)
    return hints(network, lab.images(), count, metric, centre, update, samples)


def write(folder: Path, found: Hints, title: str) -> Path:
    """Write `hints.svg` to a folder, and beside it `hints.json`, the same in numbers."""
    content = {
        "title": title,
        "layers": found.layers,
        "cluster": found.assignment,
        "chosen": found.chosen,
        "contiguous": found.contiguous,
        "similarity": found.similarity.tolist(),
    }
    checkpoint.write_atomic(folder / "hints.json", json.dumps(content, indent=1).encode())
    path = folder / "hints.svg"
    checkpoint.write_atomic(path, picture(found, title).encode())
    return path


def table(found: Hints) -> Table:
    """A row a layer: its cluster, how like its cluster's centre it is, and whether it is that."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("layer", overflow="fold")
    for column in ("cluster", "like its centre"):
        grid.add_column(column, justify="right")
    grid.add_column("hint")
    for place, (layer, cluster) in enumerate(zip(found.layers, found.assignment, strict=True)):
        like = found.similarity[place, found.centres[cluster]].item()
        chosen = "chosen" if place in found.centres else ""
        grid.add_row(Text(layer), str(cluster + 1), f"{like:.3f}", chosen)
    return grid


def picture(found: Hints, title: str) -> str:
    """The matrix of likeness as one SVG that needs nothing else: dark is alike, a frame is a cluster's run,
    and a chosen layer's name is bold."""
    count, left = len(found.layers), 24 + 7 * max(map(len, found.layers))
    side = count * CELL
    said = "" if found.contiguous else "; a cluster is no run of neighbours, so a centre may lie elsewhere"
    foot = f"Hints: {', '.join(found.chosen)}{said}"
    wide, high = max(left + side + 24, 24 + 8 * len(title), 24 + 7 * len(foot)), TOP + side + END
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label={quoteattr(title)}>',
        f'<rect width="{wide}" height="{high}" fill="{PAPER}"/>',
        f'<text x="12" y="22" font-size="15" fill="{INK}">{escape(title)}</text>',
    ]
    for i, layer in enumerate(found.layers):
        y, chosen = TOP + i * CELL, i in found.centres
        weight, colour = ("bold", ARM) if chosen else ("normal", SOFT)
        parts.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end" font-weight="{weight}" fill="{colour}">'
            f"{escape(layer)}</text>"
        )
        for j, like in enumerate(found.similarity[i].tolist()):
            parts.append(
                f'<rect x="{left + j * CELL}" y="{y}" width="{CELL}" height="{CELL}" fill="{ARM}" '
                f'fill-opacity="{like:.3f}"><title>{escape(layer)}, {escape(found.layers[j])}: {like:.3f}'
                "</title></rect>"
            )
    for start, end in _runs(found.assignment):
        parts.append(
            f'<rect x="{left + start * CELL}" y="{TOP + start * CELL}" width="{(end - start) * CELL}" '
            f'height="{(end - start) * CELL}" fill="none" stroke="{INK}" stroke-width="2"/>'
        )
    for centre in found.centres:
        x, y = (edge + centre * CELL + CELL // 2 for edge in (left, TOP))
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{PAPER}" stroke="{INK}" stroke-width="1.5"/>')
    parts.append(f'<text x="12" y="{high - 14}" fill="{SOFT}">{escape(foot)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _runs(assignment: Sequence[int]) -> list[tuple[int, int]]:
    """Where neighbours are of one cluster: the first of each run, and the first behind it."""
    starts = [n for n, own in enumerate(assignment) if n == 0 or assignment[n - 1] != own]
    return list(zip(starts, [*starts[1:], len(assignment)], strict=True))
