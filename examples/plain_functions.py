"""Only the mathematics: a method's pure function, which knows tensors and numbers, in a loop all yours.

Run it: `python examples/plain_functions.py`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from limbeck.data import digits
from limbeck.knowledge.response.dkd import dkd
from limbeck.models.cnn import CNN


def train(student: nn.Module, teacher: nn.Module | None, steps: int) -> list[float]:
    """Under a teacher when there is one; the loss of each step."""
    data, losses = digits.load().train, []
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x, y = data.rows(torch.randint(len(data), (64,), generator=draw))
        s = student(x)
        loss = F.cross_entropy(s, y)
        if teacher is not None:
            with torch.no_grad():  # nobody minds your teacher here: put it in eval, ask it without gradient
                t = teacher.eval()(x)
            loss = loss + dkd(s, t, y, alpha=1.0, beta=1.0, temperature=4.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    teacher, student = CNN(classes=10, widths=(32, 64, 128)), CNN(classes=10, widths=(8, 16, 32))
    train(teacher, None, steps)
    losses = train(student, teacher, steps)
    test = digits.load().test
    x, y = test.rows(torch.arange(len(test)))
    right = (student.eval()(x).argmax(1) == y).float().mean().item()
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}, test accuracy {100 * right:.1f}")


if __name__ == "__main__":
    main()
