"""Your own loop around a Distiller, which keeps the teacher still, makes projectors and looks inside both.

Run it: `python examples/own_loop.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from limbeck import Distiller, Ramp, Term
from limbeck.data import digits
from limbeck.data.loader import Loader
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN


def train(distiller: Distiller, loader: Loader, epochs: int) -> list[float]:
    """The mean loss of each epoch. Any loop will do; this loader's batches carry the clock for ramps."""
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    means = []
    for epoch in range(epochs):
        distiller.train()
        losses = []
        for batch in loader.epoch(epoch):
            loss = distiller(batch)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    test = digits.load().test
    x, y = test.rows(torch.arange(len(test)))
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


def main(folder: Path = Path("runs"), epochs: int = 15) -> None:
    torch.manual_seed(0)
    data = digits.load().train
    teacher, student = CNN(classes=10, widths=(32, 64, 128)), CNN(classes=10, widths=(8, 16, 32))

    loader = Loader(data, 64, seed=0, epochs=epochs)
    train(
        Distiller(teacher, None, [], example=loader.at(0)), loader, epochs
    )  # without methods: plain training

    loader = Loader(data.with_labels(100, seed=0), 64, seed=0, epochs=epochs)
    terms = [KD(temperature=4), Term(FitNet(tap="stage2"), weight=10, ramp=Ramp(epochs=5))]
    losses = train(Distiller(student, teacher, terms, example=loader.at(0)), loader, epochs)
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
    print(f"test accuracy: teacher {accuracy(teacher):.1f}, student {accuracy(student):.1f} with 100 labels")

    folder.mkdir(parents=True, exist_ok=True)
    save_file(student.state_dict(), folder / "own_loop.safetensors")  # the plain network, no projector


if __name__ == "__main__":
    main()
