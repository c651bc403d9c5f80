"""`limbeck store` and stored teachers in recipes: what was asked once teaches as if it were asked again."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck import build, cli, recipe
from limbeck.board import Board
from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.data.store import Store
from limbeck.run import Run, Stopped, resume

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


def trained(
    models: dict[str, Any],
    stages: list[dict[str, Any]],
    folder: Path,
    seed: int = 0,
    stores: Path | None = None,
) -> Run:
    plan = recipe.parse({"data": "digits", "models": models, "stages": stages})
    run = Run(plan, folder, seed=seed, stores=stores)
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


# --- store = "auto" ---

AUTO: dict[str, Any] = {**MODELS, "teacher": {**MODELS["teacher"], "store": "auto"}}
TAUGHT = {"learner": "teacher", "epochs": 1, "batch": 256}


def test_the_arms_of_a_board_ask_the_teacher_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = recipe.parse({"data": "digits", "models": AUTO, "stages": [TAUGHT, LEARNS]})
    arms = {"kd": {}, "dkd": {"terms": [{"method": "dkd"}]}, "hint": {"terms": [{"method": "fitnet"}]}}
    table = Board(plan, arms, [0, 1], tmp_path / "board")
    assert list(table.takes) == ["teacher's answers", "teacher's answers and stage2"]
    asked: dict[str, int] = {}
    ask = Frozen.__call__

    def counted(self: Frozen, batch: Batch) -> Seen:
        assert table._run is not None
        name = table._run.folder.parent.name
        asked[name] = asked.get(name, 0) + batch.rows
        return ask(self, batch)

    monkeypatch.setattr(Frozen, "__call__", counted)
    for _ in table.moments():
        pass
    rows = 2 * 2 * (len(table._run.lab.splits.train) // 128 * 128)  # type: ignore[union-attr]
    assert asked == {"kd": rows, "hint": rows}, "dkd reads what kd was told"
    assert sum(p.stat().st_size for p in (tmp_path / "board" / "stores").rglob("*.bin")) == sum(
        table.takes.values()
    )
    result = table.result()
    how = {arm["name"]: arm["how"] for arm in result["arms"]}
    assert how["control"] == [] and how["kd"][0].startswith("stored as it answers, 20 bytes a sample; live")


def test_a_store_that_lacks_what_batches_left_over_is_not_reused(tmp_path: Path) -> None:
    trained(AUTO, [LEARNS], tmp_path / "first", stores=tmp_path / "stores")
    (store,) = (tmp_path / "stores").iterdir()
    with pytest.raises(Refused, match=r"lacks 105 of 1257 samples in epoch 0.*`limbeck store write`"):
        trained(kept(store, epochs="cycle"), [LEARNS], tmp_path / "again", seed=3)
    assert not (tmp_path / "again").exists()
    trained(kept(store), [LEARNS], tmp_path / "same")


def test_arms_of_other_lessons_each_take_their_own(tmp_path: Path) -> None:
    plan = recipe.parse({"data": "digits", "models": AUTO, "stages": [TAUGHT, LEARNS]})
    arms = {"kd": {}, "dkd": {"terms": ["dkd"]}, "moved": {"augment": ["crop"]}}
    one, all_ = (Board(plan, some, [0, 1], tmp_path) for some in ({"kd": {}}, arms))
    assert all_.takes == {"teacher's answers": 2 * one.takes["teacher's answers"]}


def test_a_disk_that_one_seed_fits_on_and_all_do_not_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe.parse({"data": "digits", "models": AUTO, "stages": [LEARNS]})
    need = sum(Board(plan, {"kd": {}}, [0], tmp_path / "one").takes.values())
    free = shutil.disk_usage(tmp_path)._replace(free=4 * need)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    two = Board(plan, {"kd": {}}, [0, 1], tmp_path / "two")
    with pytest.raises(Refused, match=r"What teachers answer would take .* more than half"):
        Board(plan, {"kd": {}}, [0, 1, 2], tmp_path / "three")
    for _ in two.moments():
        pass
    Board(plan, {"kd": {}}, [0, 1, 2], tmp_path / "two")  # what is there already is no part of it


def test_the_disk_it_takes_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'data = "digits"\nmodels = { teacher = { name = "cnn", store = "auto" }, student = "cnn" }\n'
        '[[stages]]\nlearner = "teacher"\nepochs = 1\n'
        '[[stages]]\nlearner = "student"\nepochs = 1\nterms = ["kd"]\n'
    )
    out = said(monkeypatch, capsys, "run", plan, "--out", tmp_path / "run")
    place = tmp_path / "run" / "stores"
    line = f"teacher's answers, stored as they are given, will take 25.3 kB in {place}."
    assert line in out and out.index(line) < out.index("epoch 1")
    assert [store.name.partition("-")[0] for store in place.iterdir()] == ["teacher"]


def test_what_a_student_reads_is_what_the_first_one_learned_from(tmp_path: Path) -> None:
    first = trained(AUTO, [TAUGHT, LEARNS], tmp_path / "first")
    (store,) = (tmp_path / "first" / "stores").iterdir()
    weights = {"weights": str(tmp_path / "first" / "teacher.safetensors")}
    trained(kept(store), [LEARNS], tmp_path / "read")
    again = {**AUTO, "teacher": {**AUTO["teacher"], **weights}}
    trained(again, [LEARNS], tmp_path / "anew")
    a, b, c = (load_file(tmp_path / name / "student.safetensors") for name in ("first", "read", "anew"))
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert first.result is not None
    assert first.result["stages"][1]["asking"] > 0


def test_a_method_that_needs_the_live_teacher_is_refused_by_name(tmp_path: Path) -> None:
    needs = {**LEARNS, "terms": [{"method": "ofd"}]}
    with pytest.raises(Refused, match="'ofd' needs teacher_model"):
        trained(AUTO, [TAUGHT, needs], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every question to a live teacher."""
    rows: list[int] = []
    ask = Frozen.__call__

    def counted(self: Frozen, batch: Batch) -> Seen:
        rows.append(batch.rows)
        return ask(self, batch)

    monkeypatch.setattr(Frozen, "__call__", counted)
    return rows


@pytest.mark.parametrize(
    "how",
    [
        {"accumulate": 3},
        {"labels": 400, "rows": "labelled"},
        {"per_class": 16, "labels": 400},
        {"augment": ["mixup"], "task_weight": 0},
        {"epochs": 6, "patience": 1, "optim": {"student": {"lr": 1e-9}}},
    ],
    ids=lambda how: " ".join(how),
)
def test_whoever_comes_second_reads_and_learns_the_same(
    tmp_path: Path, asked: list[int], how: dict[str, Any]
) -> None:
    weights = {"weights": str(tmp_path / "teacher" / "teacher.safetensors")}
    trained(MODELS, [TAUGHT], tmp_path / "teacher")
    models, stores = {**AUTO, "teacher": {**AUTO["teacher"], **weights}}, tmp_path / "stores"
    stage = {**LEARNS, **how}
    first = trained(models, [stage], tmp_path / "first", stores=stores)
    paid = sum(asked)
    assert paid > 0
    second = trained(models, [stage], tmp_path / "second", stores=stores)
    assert sum(asked) == paid and len(list(stores.iterdir())) == 1
    a, b = (load_file(run.folder / "student.safetensors") for run in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_stages_that_ask_the_same_pay_once(tmp_path: Path, asked: list[int]) -> None:
    models = {**AUTO, "other": {"name": "cnn", "widths": [3, 3]}}
    later = {**LEARNS, "learner": "other", "epochs": 3, "terms": [{"method": "dkd"}]}
    run = trained(models, [TAUGHT, LEARNS, later], tmp_path / "run")
    rows = len(run.lab.splits.train) // 128 * 128
    assert sum(asked) == 3 * rows  # the third epoch is new
    (store,) = (tmp_path / "run" / "stores").iterdir()
    assert Store(store).epochs() == [0, 1, 2]


@pytest.mark.parametrize("steps", [4, 9, 14])
def test_stopped_anywhere_it_ends_as_if_it_had_not(tmp_path: Path, steps: int) -> None:
    """In the middle of the first epoch, at its end, in the second: nine batches each."""
    trained(AUTO, [TAUGHT, LEARNS], tmp_path / "whole")
    plan = recipe.parse({"data": "digits", "models": AUTO, "stages": [TAUGHT, LEARNS]})
    run = Run(plan, tmp_path / "cut")
    with pytest.raises(Stopped):
        for moment in run.moments():
            steps -= moment.stage
            if steps == 0:
                run.stop()
    del run
    for _ in resume(tmp_path / "cut").moments():
        pass
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_board_that_is_run_again_finds_its_stores(tmp_path: Path, asked: list[int]) -> None:
    plan = recipe.parse({"data": "digits", "models": AUTO, "stages": [TAUGHT, LEARNS]})
    for arm in ("kd", "dkd"):
        for _ in Board(plan, {arm: {"terms": [{"method": arm}]}}, [0], tmp_path / "board").moments():
            asked += [-1] if arm == "dkd" else []
    place = asked.index(-1)
    assert sum(asked[:place]) > 0 and max(asked[place:]) < 0


def test_an_arm_that_diverges_leaves_its_epoch_to_the_next(tmp_path: Path) -> None:
    plan = recipe.parse({"data": "digits", "models": AUTO, "stages": [TAUGHT, LEARNS]})
    wild = {"terms": [{"method": "kd", "weight": 1e30}]}
    table = Board(plan, {"wild": wild, "kd": {}}, [0], tmp_path / "board")
    for _ in table.moments():
        pass
    assert [arm["name"] for arm in table.result()["diverged"]] == ["wild"]
    (store,) = (tmp_path / "board" / "stores" / "0").iterdir()
    assert Store(store).epochs() == [0, 1] and not list(store.glob("*part*"))


def test_a_rehearsal_writes_nothing_whoever_asks(tmp_path: Path) -> None:
    models = {**AUTO, "second": AUTO["teacher"], "both": {"ensemble": ["teacher", "second"]}}
    stage = {**LEARNS, "terms": [{"method": "kd", "teacher": "both"}]}
    plan = recipe.parse({"data": "digits", "models": models, "stages": [stage]})
    Run(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_other_rows_are_refused_though_the_epochs_are_used_in_turn(
    live: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inside: bool,
) -> None:
    said(monkeypatch, capsys, "store", "write", live, "--out", tmp_path / "store", "--epochs", 1)
    models = {**kept(tmp_path / "store", epochs="cycle"), "group": {"ensemble": ["teacher"]}}
    term = {"method": "kd", "teacher": "group" if inside else "teacher"}
    with pytest.raises(Refused, match="its samples is 1257, here is 128"):
        trained(models, [{**LEARNS, "labels": 128, "rows": "labelled", "terms": [term]}], tmp_path / "run")


def test_an_ensemble_s_members_are_each_asked_once(tmp_path: Path, asked: list[int]) -> None:
    models = {**AUTO, "second": AUTO["teacher"], "both": {"ensemble": ["teacher", "second"]}}
    stage = {**LEARNS, "terms": [{"method": "kd", "teacher": "both"}]}
    for name in ("first", "second"):
        trained(models, [stage], tmp_path / name, stores=tmp_path / "stores")
    assert sum(asked) == 2 * 2 * (1257 // 128 * 128) and len(list((tmp_path / "stores").iterdir())) == 2


def test_what_several_lessons_take_is_added_up(tmp_path: Path) -> None:
    """That of two lessons in one store, once."""
    stages = [TAUGHT, LEARNS, {**LEARNS, "batch": 64}, {**LEARNS, "epochs": 4}]
    run = trained(AUTO, stages, tmp_path / "run")
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "stores").rglob("*.bin"))
    assert run.takes == {"teacher's answers": written}


# --- import ---


def tiny_vit(root: Path, rows: int, epochs: int = 2) -> Path:
    """Each of `rows` samples' answers to ten classes, as TinyViT saves them."""
    for epoch in range(epochs):
        folder = root / f"logits_top2_epoch{epoch}"
        folder.mkdir(parents=True)
        (folder / "rank0-keys.txt").write_text("".join(f"{row}\n" for row in range(rows)))
        packed = [struct.pack("<i2h2e", 0, row % 10, (row + 1) % 10, 0.75, 0.125) for row in range(rows)]
        (folder / "rank0-values.bin").write_bytes(b"".join(packed))
    return root


def test_tinyvits_files_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, store = tmp_path / "plan.toml", tmp_path / "store"
    plan.write_text(
        f'data = "digits"\n[models]\nstudent = {{ name = "cnn", widths = [4, 4] }}\n'
        f'teacher = {{ stored = "{store}", epochs = "cycle" }}\n'
        '[[stages]]\nlearner = "student"\nepochs = 3\nbatch = 128\nterms = ["kd"]\n'
    )
    rows = len(build.splits(recipe.read(plan).data).train)
    theirs = tiny_vit(tmp_path / "theirs", rows)
    out = said(monkeypatch, capsys, "store", "import", theirs, plan, "--out", store)
    assert "epoch 0, " in out and "epoch 1, " in out and "samples/s, done" in out
    assert f'in a recipe: teacher = {{ stored = "{store}", epochs = "cycle" }}' in out
    assert "test.accuracy" in said(monkeypatch, capsys, "run", plan, "--out", tmp_path / "run")

    keys = tmp_path / "keys.txt"
    keys.write_text("0\n")
    words = ("store", "import", theirs, plan, "--out", tmp_path / "two")
    err = said(monkeypatch, capsys, *words, "--keys", keys)
    assert f"There are 1 keys, 1 of them different, and {rows:,} samples" in err
    assert "keys.none cannot be read" in said(monkeypatch, capsys, *words, "--keys", tmp_path / "keys.none")
    assert "is not there; give TinyViT's folder" in said(
        monkeypatch, capsys, "store", "import", tmp_path / "none", plan, "--out", tmp_path / "two"
    )
    assert not (tmp_path / "two").exists()
    plan.write_text(plan.read_text().replace(', epochs = "cycle"', ""))
    err = said(monkeypatch, capsys, "run", plan, "--out", tmp_path / "exact")
    assert "was imported, and nobody knows what its teacher was shown; let the teacher's `epochs`" in err
