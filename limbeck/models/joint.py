"""A trained or fresh network together with its joint branches, so that a stage can train them and a later one
can name both as its teacher: what a recipe makes with

    learner = { name = "taught", from = "teacher", change = "limbeck.models.joint:joint" }
    learner = { name = "taught", from = "teacher", change = "limbeck.models.joint:frozen" }

A branch grows from each stage and answers for each class and each quarter turn (see `schemes/hssakd.py`).
"""

from torch import nn

from limbeck.pieces.branch import Joint, grown
from limbeck.pieces.images import TURNS


def joint(model: nn.Module) -> Joint:
    """Network and branches, which learn together (the paper's "Teacher*" when the network is fresh)."""
    return Joint(model, grown(model, type(model).__name__, TURNS))


def frozen(model: nn.Module) -> Joint:
    """The network as it is, BatchNorm statistics too; only the branches learn."""
    return Joint(model.requires_grad_(False), grown(model, type(model).__name__, TURNS))
