"""The Hugging Face Trainer around a Distiller: the student learns, the teacher stays, checkpoints resume."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.core.distiller import Distiller
from limbeck.core.scheme import Ramp, Term
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD

FILE = Path(__file__).parents[2] / "examples/hf_trainer.py"
TAPS = {"stage2": "resnet.encoder.stages.1"}


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_trainer", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(hf: ModuleType, folder: Path, epochs: int, ramp: Ramp | None = None) -> Any:
    """A student, its teacher, which has had some lessons, and the example's Trainer with a projector."""
    torch.manual_seed(0)
    teacher, student = hf.resnet(16), hf.resnet(8)
    for model in (teacher, student):
        model.TAPS = TAPS
    rows = hf.rows(320)
    x, y = (torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels"))
    lessons = torch.optim.Adam(teacher.parameters(), 0.01)
    for _ in range(20):
        lessons.zero_grad()
        teacher.train()(pixel_values=x, labels=y).loss.backward()
        lessons.step()
    teacher.zero_grad()
    terms = [Term(KD(), ramp=ramp), FitNet(tap="stage2")]
    distiller = Distiller(student, teacher, terms, example=({"pixel_values": x[:8]}, y[:8]))
    return teacher, hf.trainer(distiller, folder, epochs, rows[:256], rows[256:])


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_student_learns_and_the_teacher_does_not(hf: ModuleType, tmp_path: Path) -> None:
    teacher, trainer = case(hf, tmp_path, epochs=6)
    before, fresh = bits(teacher), bits(trainer.model.methods)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert same(bits(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())
    assert not same(bits(trainer.model.methods), fresh), "the projector should learn too"


def test_what_is_evaluated_is_the_student(hf: ModuleType, tmp_path: Path) -> None:
    _, trainer = case(hf, tmp_path, epochs=1)
    x = torch.stack([row["pixel_values"] for row in trainer.eval_dataset])
    told = trainer.predict(trainer.eval_dataset)
    expected = trainer.model.student.eval()(pixel_values=x).logits.detach()
    torch.testing.assert_close(torch.as_tensor(told.predictions), expected)
    y = torch.as_tensor(told.label_ids)
    loss = torch.nn.functional.cross_entropy(expected, y).item()
    assert told.metrics["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_what_ships_is_the_plain_student(hf: ModuleType, tmp_path: Path) -> None:
    _, trainer = case(hf, tmp_path / "work", epochs=1)
    trainer.train()
    trainer.save_student(tmp_path / "shipped")
    student = hf.resnet(8)
    student.load_state_dict(load_file(tmp_path / "shipped/model.safetensors"), strict=True)
    assert same(bits(student), bits(trainer.model.student))
    again = hf.ResNetForImageClassification.from_pretrained(tmp_path / "shipped")
    assert same(bits(again), bits(trainer.model.student))


def test_a_checkpoint_resumes_and_does_not_hold_the_teacher(hf: ModuleType, tmp_path: Path) -> None:
    _, whole = case(hf, tmp_path / "whole", epochs=2)
    whole.args.save_total_limit = None
    whole.train()
    middle, _ = sorted((tmp_path / "whole").glob("checkpoint-*"))
    kept = load_file(middle / "model.safetensors")
    assert kept.keys() == whole.model.state_dict().keys()
    assert {name.split(".")[0] for name in kept} == {"student", "methods"}

    _, resumed = case(hf, tmp_path / "resumed", epochs=2)
    resumed.train(resume_from_checkpoint=str(middle))
    assert same(bits(resumed.model), bits(whole.model))


def test_ramps_follow_the_trainers_epochs(hf: ModuleType, tmp_path: Path) -> None:
    _, trainer = case(hf, tmp_path, epochs=3, ramp=Ramp(epochs=1, after=2))
    seen: list[tuple[int, bool]] = []

    def note(module: Any, args: Any, kwargs: Any, told: Any) -> None:
        if module.training:
            seen.append((kwargs["lesson"].epoch, bool(told["kd"] > 0)))

    trainer.model.register_forward_hook(note, with_kwargs=True)
    trainer.train()
    assert sorted(set(seen)) == [(0, False), (1, False), (2, True)]


def test_the_example_runs(hf: ModuleType, tmp_path: Path) -> None:
    trainer = hf.main(tmp_path, epochs=1, count=128)
    assert (tmp_path / "shipped/model.safetensors").exists() and trainer.state.global_step == 2
