"""`limbeck store` and stored teachers in recipes: what was asked once teaches as if it were asked again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck import cli, recipe
from limbeck.core.refused import Refused
from limbeck.run import Run

MODELS: dict[str, Any] = {
    "teacher": {"name": "cnn", "widths": [6, 8]},
    "student": {"name": "cnn", "widths": [4, 4]},
}
LEARNS = {"learner": "student", "epochs": 2, "batch": 128, "labels": 50, "terms": [{"method": "kd"}]}


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr("sys.argv", ["limbeck", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return out if not ended.value.code else err


def trained(models: dict[str, Any], stages: list[dict[str, Any]], folder: Path, seed: int = 0) -> Run:
    run = Run(recipe.parse({"data": "digits", "models": models, "stages": stages}), folder, seed=seed)
    for _ in run.moments():
        pass
    return run


@pytest.fixture
def live(tmp_path: Path) -> Path:
    trained(MODELS, [{"learner": "teacher", "epochs": 1, "batch": 256}, LEARNS], tmp_path / "live")
    return tmp_path / "live"


def kept(folder: Path, **more: Any) -> dict[str, Any]:
    return {**MODELS, "teacher": {"stored": str(folder), **more}}


def test_a_store_teaches_as_the_teacher_did_bit_for_bit(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    out = said(monkeypatch, capsys, "store", "write", live, "--out", store, "--kind", "float32")
    assert out.index("It will take 101 kB on disk, 40 bytes a sample") < out.index("Stored:")
    assert json.loads(said(monkeypatch, capsys, "store", "info", store))["epochs"] == [0, 1]
    checked = said(monkeypatch, capsys, "store", "verify", store, live, "--sample", 100)
    assert "128 rows: largest difference out 0;" in checked
    trained(kept(store), [LEARNS], tmp_path / "read")
    asked, read = (load_file(folder / "student.safetensors") for folder in (live, tmp_path / "read"))
    assert asked.keys() == read.keys() and all(torch.equal(asked[name], read[name]) for name in asked)


def test_another_lesson_is_refused_before_the_first_step_or_cycled(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    said(monkeypatch, capsys, "store", "write", live, "--out", store, "--epochs", 1)
    with pytest.raises(Refused, match=r"In stage 0: .* its seed is 0, here is 3"):
        trained(kept(store), [LEARNS], tmp_path / "other", seed=3)
    with pytest.raises(Refused, match="The lesson has 2 epochs"):
        trained(kept(store), [LEARNS], tmp_path / "longer")
    with pytest.raises(Refused, match="does not hold tap 'stage2'"):
        trained(kept(store), [{**LEARNS, "epochs": 1, "terms": [{"method": "fitnet"}]}], tmp_path / "taps")
    with pytest.raises(Refused, match="'ofd' needs teacher_model"):
        trained(kept(store), [{**LEARNS, "epochs": 1, "terms": [{"method": "ofd"}]}], tmp_path / "needs")
    assert not (tmp_path / "other").exists()
    assert trained(kept(store, epochs="cycle"), [LEARNS], tmp_path / "cycle", seed=3).result is not None


def test_a_teacher_that_has_not_learned_has_nothing_to_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'data = "digits"\nmodels = { teacher = "cnn", student = "cnn" }\n'
        '[[stages]]\nlearner = "teacher"\nepochs = 1\n[[stages]]\nlearner = "student"\nepochs = 1\n'
    )
    err = said(monkeypatch, capsys, "store", "write", plan, "--out", tmp_path / "store")
    assert "'teacher' learns in" in err and "the folder of the finished run" in err
    assert "Stage 2 was asked for" in said(
        monkeypatch, capsys, "store", "write", plan, "--out", tmp_path / "store", "--stage", 2
    )
    assert not (tmp_path / "store").exists()


def test_a_store_cannot_learn(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said(monkeypatch, capsys, "store", "write", live, "--out", tmp_path / "store")
    with pytest.raises(Refused, match="'teacher' is a teacher without a network"):
        trained(kept(tmp_path / "store"), [{"learner": "teacher", "epochs": 1}], tmp_path / "run")
