r"""Deep Mutual Learning (Zhang, Xiang, Hospedales, Lu; CVPR 2018; arXiv:1706.00384).

Two or more untrained networks learn together, and each is taught by the others. With $p_k$ the answer of
network $k$ of $K$, it learns by

$$L_k = \mathrm{CE}(y, p_k) + \frac1{K-1} \sum_{j \ne k} \mathrm{KL}(p_j \,\|\, p_k)$$

which in a recipe is `learner = ["a", "b"]`, `scheme = "online"` and the term
`{ method = "kd", temperature = 1, teacher = ["a", "b"] }`: a term is the mean over the teachers it names, and
nobody teaches himself. Other methods, several of them, and trained teachers beside the peers work as well.
What ships is the first network.

The paper's Algorithm 1 lets the networks take turns, each asked anew after it learned (`in_turn = true`).
The default is the common variant, where all answer once a batch, and then learn: it saves a forward a
network, and the answers differ by one step of learning.

Departures: an answer that teaches is that of a network in training, as in the authors' code, but what it was
asked for anew leaves its BatchNorm statistics alone: one batch moves them once.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme, Turn
from limbeck.core.taps import unmoved
from limbeck.core.teachers import Peer, Teacher, each_once


class Online(Scheme):
    """Args: distillers, each learner's lesson by its name, the first is shipped; peers, the learners as each
    other's teachers; in_turn, whether who learned is asked anew before the next one learns."""

    learners_teach = True

    def __init__(
        self, distillers: Mapping[str, Distiller], peers: Mapping[str, Peer], in_turn: bool = False
    ) -> None:
        self.distillers, self.peers, self.in_turn = dict(distillers), dict(peers), in_turn
        for name, peer in self.peers.items():
            self.distillers[name].look(peer.names)

    @classmethod
    def staged(cls, cast: Cast, in_turn: bool = False) -> "Online":
        if len(cast.learners) < 2:
            raise Refused(
                f"The scheme 'online' has two or more networks learn from each other, and the stage names "
                f'{", ".join(cast.learners)} alone; write learner = ["a", "b"].'
            )
        return cls({name: cast.distiller(name) for name in cast.learners}, cast.peers, in_turn)

    def turns(self, batch: Batch) -> Iterator[Turn]:
        shown = {name: distiller.show(batch) for name, distiller in self.distillers.items()}
        answers = {name: views[0][0].detach() for name, views in shown.items()}
        for name, distiller in self.distillers.items():
            for other, peer in self.peers.items():
                peer.told(answers[other])
            sight = distiller.ask(batch, shown.pop(name))
            for rival, loss in distiller.rival_losses(sight):
                yield f"{name}.{rival}", {f"{name}.{rival}": loss}
            yield name, {f"{name}.{loss}": value for loss, value in distiller.losses(sight).items()}
            if self.in_turn and shown:  # somebody is still to be taught
                with torch.no_grad(), unmoved(distiller.student):
                    answers[name] = distiller.show(batch)[0][0]

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {
            name if player == "student" else f"{name}.{player}": theirs
            for name, distiller in self.distillers.items()
            for player, theirs in distiller.players().items()
        }

    def figures(self) -> dict[str, float]:
        return {
            f"{name}.{figure}": value
            for name, distiller in self.distillers.items()
            for figure, value in distiller.figures().items()
        }

    def shipped(self) -> nn.Module:
        return next(iter(self.distillers.values())).student

    def modules(self) -> Mapping[str, nn.Module]:
        return dict(self.distillers)

    def teachers(self) -> tuple[Teacher, ...]:
        each = [teacher for distiller in self.distillers.values() for teacher in distiller.teachers()]
        return each_once(each)

    def refuse_cut(self) -> str | None:
        return next(filter(None, (distiller.refuse_cut() for distiller in self.distillers.values())), None)
