"""limbeck distils a big trained network into a small one, and shows whether it helped.

Names are imported when first used, so that `limbeck --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.core.batch import Batch, Lesson
    from limbeck.core.distiller import Distiller
    from limbeck.core.method import Card, Method
    from limbeck.core.refused import Refused
    from limbeck.core.scheme import Ramp, Scheme, Term
    from limbeck.core.taps import Seen
    from limbeck.core.task import Task
    from limbeck.core.teachers import Ensemble, Frozen, MeanOf, Teacher

__version__ = "0.1.0.dev0"

_HOMES = {
    "Batch": "batch",
    "Card": "method",
    "Distiller": "distiller",
    "Ensemble": "teachers",
    "Frozen": "teachers",
    "Lesson": "batch",
    "MeanOf": "teachers",
    "Method": "method",
    "Ramp": "scheme",
    "Refused": "refused",
    "Scheme": "scheme",
    "Seen": "taps",
    "Task": "task",
    "Teacher": "teachers",
    "Term": "scheme",
}

__all__ = [
    "Batch",
    "Card",
    "Distiller",
    "Ensemble",
    "Frozen",
    "Lesson",
    "MeanOf",
    "Method",
    "Ramp",
    "Refused",
    "Scheme",
    "Seen",
    "Task",
    "Teacher",
    "Term",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute '{name}'")
    return getattr(importlib.import_module(f"limbeck.core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
