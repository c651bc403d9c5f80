"""`taps = "cluster"` in a recipe, and `limbeck hints`: what clustering chose is what the method looks at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from limbeck import build, equation, recipe
from limbeck import hints as door
from limbeck.build import Lab
from limbeck.core.refused import Refused
from limbeck.core.teachers import Frozen
from limbeck.models.hints import hints
from limbeck.recipe import Recipe
from limbeck.run import Run, Stopped, resume

TEACHER = {"name": "resnet14", "widths": [4, 4, 5, 6]}
STUDENT = {"name": "resnet8", "widths": [3, 3, 4, 5]}
AT = {"method": "at", "taps": "cluster", "weight": 100.0}


def plan(terms: list[Any], teacher: Any = TEACHER, epochs: int = 1, **models: Any) -> Recipe:
    return recipe.parse(
        {
            "data": "digits",
            "models": {"teacher": teacher, "student": STUDENT, **models},
            "stages": [
                {"learner": "teacher", "epochs": 1, "batch": 300},
                {"learner": "student", "epochs": epochs, "batch": 300, "terms": terms},
            ],
        }
    )


def lab(*terms: Any, seed: int = 0) -> Lab:
    """The teacher's weights are the same under every seed."""
    made = build.lab(plan(list(terms)), seed)
    with torch.no_grad():
        torch.manual_seed(0)
        for p in made.models["teacher"].parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return made


def chosen(made: Lab) -> tuple[str, ...]:
    teacher = made.teacher("teacher")
    assert isinstance(teacher, Frozen)
    return hints(teacher, made.images(), 3).chosen


def finish(run: Run) -> Path:
    for _ in run.moments():
        pass
    return run.folder


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("stage", "epoch", "steps", "losses", "scores")} for line in lines]


# --- in a recipe ---


def test_what_is_chosen_is_what_the_method_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck.knowledge.feature.at import AT as Attention

    compared: list[Any] = []
    monkeypatch.setattr(Attention, "build", lambda self, s, t, batch: compared.append((s, t)))
    made = lab(AT)
    made.engine(1)
    layers = chosen(made)
    assert made.hints == {"1.0": dict(zip(("stage1", "stage2", "stage3"), layers, strict=True))}
    ((s, t),) = compared
    student, teacher = made.models["student"], made.models["teacher"]
    for name, layer in made.hints["1.0"].items():
        assert t.modules[name] is teacher.get_submodule(layer) and t.at[name].equal(t.at[layer])
        assert s.modules[name] is student.get_submodule(student.TAPS[name])  # type: ignore[index, operator]


def test_it_is_the_same_under_every_seed_and_without_labels() -> None:
    found = []
    for seed in (0, 1, 2):
        made = lab(AT, seed=seed)
        made.engine(1)
        found.append(made.hints)
    train = made.splits.train
    shuffled = replace(train, y=train.y.roll(7))
    again = replace(lab(AT), splits=replace(made.splits, train=shuffled))
    again.engine(1)
    assert found == [again.hints] * 3
    orders = [torch.cat([batch.index for batch in lab(seed=seed).images()]) for seed in (0, 1)]
    assert orders[0].equal(orders[1]) and not orders[0].equal(orders[0].sort().values)
    batch = next(again.images())
    assert batch.y is not None and (batch.y == -100).all() and (batch.lesson.labels == -100).all()


def test_a_hint_that_weighs_nothing_is_kd_alone_bit_for_bit() -> None:
    def step(*terms: Any) -> tuple[dict[str, Tensor], Lab]:
        made = lab(*terms)
        next(made.engine(1).lessons())
        return made.models["student"].state_dict(), made

    hinted, made = step("kd", {**AT, "weight": 0.0})
    alone, _ = step("kd")
    assert not made.hints and all(value.equal(alone[name]) for name, value in hinted.items())
    other, _ = step("kd", AT)
    assert any(not value.equal(alone[name]) for name, value in other.items())


def test_a_stopped_run_goes_on_with_the_layers_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finish(Run(plan(["kd", AT], epochs=2), tmp_path / "whole"))
    run = Run(plan(["kd", AT], epochs=2), tmp_path / "stopped")
    with pytest.raises(Stopped):
        for moment in run.moments():
            if moment.stage == 1 and moment.record is None:
                run.stop()

    def never(*_: Any) -> None:
        raise AssertionError("the layers were chosen before")

    monkeypatch.setattr(build, "paired", never)
    again = finish(resume(tmp_path / "stopped"))
    assert metrics(again) == metrics(whole) and result(again)["hints"] == result(whole)["hints"]
    ((where, pairs),) = result(whole)["hints"].items()
    assert where == "1.1" and list(pairs) == ["stage1", "stage2", "stage3"]
    assert "hints" not in result(whole)["stages"][0]


def test_a_rehearsal_looks_at_a_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(build, "paired")
    build.rehearse(plan([AT, {"method": "fitnet", "taps": "cluster"}]))


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([{"method": "crd", "taps": "cluster"}], "looks at no block's output"),
        ([{**AT, "teacher": "slow"}], "layers of slow cannot be clustered for method 'at'.*one network"),
        ([{**AT, "teacher": ["teacher", "second"]}], "layers of teacher and second cannot be clustered"),
        ([{**AT, "taps": "cluster", "pairs": {"stage1": "stem"}}], "chooses the taps that `pairs` names"),
        ([{"method": "at", "pairs": "clusters"}], "pairs is 'clusters': expected 'cluster'"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_the_first_step(terms: list[Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        build.rehearse(plan(terms, slow={"mean_of": "student"}, second=TEACHER))


def test_a_teacher_too_shallow_or_too_wide_is_refused_before_the_first_step() -> None:
    with pytest.raises(Refused, match="3 clusters of 2 layers"):
        build.rehearse(plan([{**AT, "method": "vid"}], {"name": "cnn", "widths": [4, 5]}))
    with pytest.raises(
        Refused, match=r"up to 130 channels would be compared by 1,257 samples.*1,300 or more"
    ):
        build.rehearse(plan([AT], {**TEACHER, "widths": [4, 4, 4, 130]}))


def test_a_recipe_tells_that_layers_are_chosen_and_is_what_it_was_when_read_again() -> None:
    made = plan([AT])
    assert "taps=[stage1, stage2, stage3], the teacher's taps by clustering)" in equation.told(made)
    assert recipe.parse(json.loads(made.as_json())) == made


# --- at the door ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(Run(plan([]), tmp_path_factory.mktemp("run")))


def test_weights_or_a_recipe_that_names_them(trained: Path, tmp_path: Path) -> None:
    weights = str(trained / "teacher.safetensors")
    found = door.find(weights, "digits", count=2)
    assert len(found.layers) == 6 and len(found.chosen) == 2
    made = tmp_path / "recipe.toml"
    net = f'{{ name = "resnet14", widths = [4, 4, 5, 6], weights = {json.dumps(weights)} }}'
    made.write_text(
        f'data = "digits"\nmodels = {{ big = {net}, small = "resnet8" }}\n'
        '[[stages]]\nlearner = "small"\nepochs = 1\n'
    )
    by_name = door.find(str(made), called="big", count=2)
    assert by_name.chosen == found.chosen and by_name.similarity.equal(found.similarity)
    assert door.find(weights, "digits", metric="cka", update="medoid").similarity.ne(found.similarity).any()


def test_who_has_nothing_to_show_is_refused(trained: Path, tmp_path: Path) -> None:
    made = tmp_path / "recipe.toml"
    made.write_text(
        'data = "digits"\nmodels = { teacher = "resnet14" }\n[[stages]]\nlearner = "teacher"\nepochs = 1\n'
    )
    with pytest.raises(Refused, match=r"'teacher' in .*recipe.toml is no network with weights"):
        door.find(str(made))
    with pytest.raises(Refused, match=r"'big' in .* is no network with weights"):
        door.find(str(made), called="big")
    with pytest.raises(Refused, match="give a data set or a folder as --data"):
        door.find(str(trained / "teacher.safetensors"))
    with pytest.raises(Refused, match="'resnet14' is neither a recipe"):
        door.find("resnet14", "digits")
    with pytest.raises(Refused, match=r"6 channels .* 50 samples"):
        door.find(str(trained / "teacher.safetensors"), "digits", samples=50)


def test_the_picture_shows_every_pair_the_clusters_and_the_chosen(trained: Path, tmp_path: Path) -> None:
    found = door.find(str(trained / "teacher.safetensors"), "digits")
    title = 'Layers of "a" & <b>'
    path = door.write(tmp_path, found, title)
    drawn = ElementTree.parse(path).getroot()
    assert drawn.attrib["aria-label"] == title
    kind = {
        name: drawn.findall(f"{{http://www.w3.org/2000/svg}}{name}") for name in ("rect", "circle", "text")
    }
    cells = [rect for rect in kind["rect"] if "fill-opacity" in rect.attrib]
    shades = torch.tensor([float(cell.attrib["fill-opacity"]) for cell in cells]).view(6, 6)
    torch.testing.assert_close(shades, found.similarity.float(), rtol=0, atol=6e-4)
    assert len(kind["circle"]) == 3
    bold = [text.text for text in kind["text"] if text.attrib.get("font-weight") == "bold"]
    assert bold == list(found.chosen)
    frames = [rect for rect in kind["rect"] if rect.attrib["fill"] == "none"]
    runs = 1 + sum(a != b for a, b in zip(found.assignment, found.assignment[1:], strict=False))
    assert len(frames) == runs
    assert sum(int(frame.attrib["width"]) for frame in frames) == 6 * door.CELL
    told = json.loads((tmp_path / "hints.json").read_text())
    assert told["chosen"] == list(found.chosen) and told["similarity"] == found.similarity.tolist()


def test_the_command_prints_a_row_a_layer(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["limbeck", "hints", str(trained / "teacher.safetensors"), "--data", "digits", "--count", "2"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().out
    assert not end.value.code
    rows = [line.split() for line in said.splitlines() if line.startswith("layer") and "." in line]
    found = door.find(str(trained / "teacher.safetensors"), "digits", count=2)
    assert [row[0] for row in rows] == list(found.layers)
    assert [int(row[1]) - 1 for row in rows] == list(found.assignment)
    assert [row[0] for row in rows if row[-1] == "chosen"] == list(found.chosen)
    assert f'pairs = {{ stage1 = "{found.chosen[0]}", stage2 = "{found.chosen[1]}" }}' in said
    assert (tmp_path / "runs/hints/hints.svg").exists()
