"""Lightning around a Distiller. Needs the extra: pip install "limbeck[lightning]".

Run it: `python examples/lightning_loop.py`.
"""

from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from limbeck import Distiller, Lesson
from limbeck.data import digits
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN


class Distilling(lightning.LightningModule):
    """Student and projectors are its children; the teacher is not, so no checkpoint holds it."""

    def __init__(self, distiller: Distiller, lr: float = 0.05) -> None:
        super().__init__()
        self.distiller, self.lr = distiller, lr

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        x, y = batch
        clock = Lesson(epoch=self.current_epoch, epochs=self.trainer.max_epochs or 1)
        losses = self.distiller(x, y, lesson=clock)
        self.log_dict({name: losses[name].detach() for name in losses if name != "logits"}, on_epoch=True)
        return losses["loss"]

    def validation_step(self, batch: list[Tensor], number: int) -> None:
        x, y = batch
        logits = self.distiller(x)  # in eval: the student's answer
        self.log("valid_loss", F.cross_entropy(logits, y))
        self.log("valid_accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def rows(split: Any) -> TensorDataset:
    return TensorDataset(*split.rows(torch.arange(len(split))))


def trainer(folder: Path, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,  # Lightning's own checkpoints are pickles; what ships is saved below
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(folder: Path = Path("runs/lightning"), epochs: int = 6) -> lightning.Trainer:
    torch.manual_seed(0)
    splits = digits.load()
    train = DataLoader(rows(splits.train), batch_size=64, shuffle=True)
    valid = DataLoader(rows(splits.valid), batch_size=256)
    teacher, student = CNN(classes=10, widths=(32, 64, 128)), CNN(classes=10, widths=(8, 16, 32))
    example = splits.train.rows(torch.arange(8))

    trainer(folder, epochs).fit(Distilling(Distiller(teacher, None, [], example=example)), train, valid)
    distiller = Distiller(student, teacher, [KD(temperature=4), FitNet(tap="stage2")], example=example)
    last = trainer(folder, epochs)
    last.fit(Distilling(distiller), train, valid)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(student.state_dict(), folder / "student.safetensors")
    print({name: round(float(value), 3) for name, value in last.callback_metrics.items()})
    return last


if __name__ == "__main__":
    main()
