"""Keep a finished board: `python benchmarks/keep.py runs/NAME ARENA`.

Writes benchmarks/results/ARENA/NAME.json: every score, seed and setting, the machine, the cells' commit.
"""

import json
import sys
from pathlib import Path
from typing import Any


def keep(folder: Path, arena: str) -> Path:
    board = json.loads((folder / "board.json").read_text(encoding="utf-8"))
    for arm in board["arms"]:
        # What methods watched is what a claim is made of; losses and validation scores by epoch are not kept.
        watched = [_watched(curve) for curve in arm.pop("curves")]
        arm["figures"] = watched if any(watched) else []
        arm["pictures"] = []
    if board["answers"]:
        board["answers"]["samples"] = None  # pictures
    kept = Path(__file__).parent / "results" / arena / f"{folder.name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(board, indent=1) + "\n", encoding="utf-8")
    return kept


def _watched(curve: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Figures by name, one number an epoch."""
    names = dict.fromkeys(name for record in curve for name in record["figures"])
    return {name: [round(record["figures"][name], 4) for record in curve] for name in names}


if __name__ == "__main__":
    print(keep(Path(sys.argv[1]), sys.argv[2]))
