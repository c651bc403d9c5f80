"""The Hugging Face Trainer around a Distiller. Needs the extra: pip install "limbeck[hf]".

Two small ResNets of theirs and handwritten digits; nothing is downloaded.
Run it: `python examples/hf_trainer.py`.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from limbeck import Distiller, Lesson
from limbeck.data import digits
from limbeck.knowledge.response.kd import KD


class DistillTrainer(Trainer):
    """Its model is a Distiller. A checkpoint holds projectors too, so it resumes; `save_student` ships."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        x, y = {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]
        clock = Lesson(epoch=int(self.state.epoch or 0), epochs=int(self.args.num_train_epochs))
        told = model(x, y, lesson=clock)
        if not model.training:  # evaluation: the student's answer alone
            told = {"loss": F.cross_entropy(told, y), "logits": told}
        return (told["loss"], {"logits": told["logits"]}) if return_outputs else told["loss"]

    def save_student(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).student.save_pretrained(folder)


def resnet(width: int) -> ResNetForImageClassification:
    depth = {"hidden_sizes": [width, 2 * width], "depths": [1, 1], "layer_type": "basic"}
    shape = {"num_channels": 1, "num_labels": 10, "embedding_size": width}
    return ResNetForImageClassification(ResNetConfig(**shape, **depth))


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    x, y = digits.load().train.rows(torch.arange(count))
    return [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]


def trainer(
    distiller: Distiller, folder: Path, epochs: int, train: list[Any], valid: list[Any]
) -> DistillTrainer:
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=5e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
        label_names=["labels"],
        remove_unused_columns=False,  # it would keep what the Distiller's forward names: x and y
    )
    return DistillTrainer(model=distiller, args=settings, train_dataset=train, eval_dataset=valid)


def main(folder: Path = Path("runs/hf_trainer"), epochs: int = 6, count: int = 1024) -> DistillTrainer:
    torch.manual_seed(0)
    teacher, student = resnet(32), resnet(8)
    every = rows(count + 128)
    train, valid = every[:-128], every[-128:]
    first = default_data_collator(train[:8])
    example = {"pixel_values": first["pixel_values"]}, first["labels"]

    trainer(Distiller(teacher, None, [], example=example), folder / "teacher", epochs, train, valid).train()
    distiller = Distiller(student, teacher, [KD(temperature=4)], example=example)
    last = trainer(distiller, folder / "student", epochs, train, valid)
    last.train()
    last.save_student(folder / "shipped")  # ResNetForImageClassification.from_pretrained reads it
    return last


if __name__ == "__main__":
    main()
