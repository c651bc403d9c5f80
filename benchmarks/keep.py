"""Keep a finished board: `python benchmarks/keep.py runs/NAME ARENA`.

Writes benchmarks/results/ARENA/NAME.json: every score, seed and setting, the machine, the cells' commit.
"""

import json
import sys
from pathlib import Path


def keep(folder: Path, arena: str) -> Path:
    board = json.loads((folder / "board.json").read_text(encoding="utf-8"))
    for arm in board["arms"]:
        del arm["curves"]
    if board["answers"]:
        board["answers"]["samples"] = None  # pictures
    kept = Path(__file__).parent / "results" / arena / f"{folder.name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(board, indent=1) + "\n", encoding="utf-8")
    return kept


if __name__ == "__main__":
    print(keep(Path(sys.argv[1]), sys.argv[2]))
