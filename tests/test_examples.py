"""The examples run, the student learns in them, and the teacher does not.

Those that need an extra have their tests in tests/extras/.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.distiller import Distiller
from limbeck.data import digits
from limbeck.data.loader import Loader
from limbeck.knowledge.response.dkd import dkd
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN

EXAMPLES = Path(__file__).parent.parent / "examples"
WITH_EXTRAS = {"hf_trainer", "lightning_loop"}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"plain_functions", "own_loop"} | WITH_EXTRAS
    extras = {
        file.stem.removeprefix("test_") for file in (EXAMPLES.parent / "tests/extras").glob("test_*.py")
    }
    assert extras >= WITH_EXTRAS


def test_plain_functions_teach(capsys: pytest.CaptureFixture[str]) -> None:
    plain = example("plain_functions")
    torch.manual_seed(0)
    teacher, student = CNN(classes=10, widths=(16, 32, 64)), CNN(classes=10, widths=(8, 16, 32))
    plain.train(teacher, None, 60)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x, y = digits.load().train.rows(torch.arange(256))

    def apart() -> float:
        return dkd(student(x), teacher.eval()(x), y, beta=1.0).item()

    at_first = apart()
    losses = plain.train(student, teacher, 60)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]) and apart() < 0.6 * at_first
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    plain.main(steps=20)
    assert "test accuracy" in capsys.readouterr().out


def test_ones_own_loop_teaches_and_ships_the_plain_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = example("own_loop")
    own.main(tmp_path / "new", epochs=2)
    assert "student" in capsys.readouterr().out
    CNN(classes=10, widths=(8, 16, 32)).load_state_dict(load_file(tmp_path / "new/own_loop.safetensors"))


def test_ones_own_loop_leaves_the_teacher_alone() -> None:
    own = example("own_loop")
    torch.manual_seed(0)
    teacher, student = CNN(classes=10, widths=(16, 32, 64)), CNN(classes=10, widths=(8, 16, 32))
    loader = Loader(digits.load().train, 64, seed=0, epochs=2)
    own.train(Distiller(teacher, None, [], example=loader.at(0)), loader, 2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses = own.train(Distiller(student, teacher, [KD()], example=loader.at(0)), loader, 2)
    assert losses[1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
