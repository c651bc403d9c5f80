"""Lightning around a Distiller: the student learns, the teacher stays and is in no checkpoint."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from limbeck.core.distiller import Distiller
from limbeck.core.scheme import Ramp, Term
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN

FILE = Path(__file__).parents[2] / "examples/lightning_loop.py"

# Lightning's own: how it reads a batch, and what it thinks of loaders without worker processes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*:UserWarning"),
]


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lightning_loop", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(loop: ModuleType, ramp: Ramp | None = None) -> tuple[CNN, Any, DataLoader, DataLoader]:
    torch.manual_seed(0)
    teacher, student = CNN(classes=10, widths=(16, 32, 64)), CNN(classes=10, widths=(8, 16, 32))
    x, y = loop.digits.load().train.rows(torch.arange(256))
    lessons = torch.optim.Adam(teacher.parameters(), 0.01)
    for _ in range(20):
        lessons.zero_grad()
        torch.nn.functional.cross_entropy(teacher(x), y).backward()
        lessons.step()
    teacher.zero_grad()
    terms = [Term(KD(), ramp=ramp), FitNet(tap="stage2")]
    distiller = Distiller(student, teacher, terms, example=(x[:8], y[:8]))
    train, valid = TensorDataset(x[:192], y[:192]), TensorDataset(x[192:], y[192:])
    return teacher, loop.Distilling(distiller), DataLoader(train, 32), DataLoader(valid, 64)


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_student_learns_and_the_teacher_does_not(loop: ModuleType, tmp_path: Path) -> None:
    teacher, lesson, train, valid = case(loop)
    before, fresh, losses = bits(teacher), bits(lesson.distiller.methods), []

    def note(module: Any, args: Any, told: Any) -> None:
        if module.training:
            assert not any(part.training for part in teacher.modules())
            losses.append(told["loss"].item())

    lesson.distiller.register_forward_hook(note)
    loop.trainer(tmp_path, epochs=3).fit(lesson, train, valid)
    assert len(losses) == 18 and sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert same(bits(teacher), before)
    assert not same(bits(lesson.distiller.methods), fresh), "the projector should learn too"


def test_what_is_validated_is_the_student(loop: ModuleType, tmp_path: Path) -> None:
    _, lesson, train, valid = case(loop)
    trainer = loop.trainer(tmp_path, epochs=1)
    trainer.fit(lesson, train, valid)
    x, y = valid.dataset.tensors
    loss = torch.nn.functional.cross_entropy(lesson.distiller.student.eval()(x), y).item()
    assert trainer.callback_metrics["valid_loss"].item() == pytest.approx(loss, rel=1e-4)


def test_a_checkpoint_holds_the_student_and_the_projectors_only(loop: ModuleType, tmp_path: Path) -> None:
    _, lesson, train, valid = case(loop)
    saved: list[dict[str, Any]] = []
    lesson.on_save_checkpoint = saved.append
    trainer = loop.trainer(tmp_path, epochs=1)
    trainer.fit(lesson, train, valid)
    trainer.save_checkpoint(tmp_path / "lesson.ckpt")
    (content,) = saved
    parts = {".".join(name.split(".")[:2]) for name in content["state_dict"]}
    assert parts == {"distiller.student", "distiller.methods"}
    held = sum(value.numel() for value in content["state_dict"].values())
    assert held == sum(value.numel() for value in lesson.distiller.state_dict().values())


def test_ramps_follow_lightnings_epochs(loop: ModuleType, tmp_path: Path) -> None:
    _, lesson, train, valid = case(loop, ramp=Ramp(epochs=1, after=1))
    seen: list[bool] = []

    def note(module: Any, args: Any, told: Any) -> None:
        if module.training:
            seen.append(bool(told["kd"] > 0))

    lesson.distiller.register_forward_hook(note)
    loop.trainer(tmp_path, epochs=2).fit(lesson, train, valid)
    assert seen == [False] * 6 + [True] * 6


def test_the_example_runs_and_ships_the_plain_student(loop: ModuleType, tmp_path: Path) -> None:
    trainer = loop.main(tmp_path, epochs=1)
    student = CNN(classes=10, widths=(8, 16, 32))
    student.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    assert same(bits(student), bits(trainer.lightning_module.distiller.student))
