"""Before any test: one thread, and the shapes that stand in signatures are checked at every call."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # "bit for bit" holds at equal thread count; child processes inherit it

os.environ["LIMBECK_OFFLINE"] = "1"  # nothing is downloaded

import jaxtyping
import torch

torch.set_num_threads(1)

# Only files with shapes: beartype checks Python types too, and elsewhere tests hand in doubles and bad input.
ROOT = Path(__file__).parent.parent
SHAPED = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "limbeck").rglob("*.py")
    if "jaxtyping" in file.read_text(encoding="utf-8")
]
# An int will do for a float, as it does for mypy.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"

assert not set(SHAPED) & set(sys.modules), "limbeck was imported before its shapes could be checked"
jaxtyping.install_import_hook(SHAPED, CHECKER)

# Dynamo cannot trace the checks; what it compiles is checked where it runs uncompiled.
type(jaxtyping.config).jaxtyping_disable = property(lambda config: torch.compiler.is_compiling())
