"""A run ends where it would have ended, however often it was stopped on the way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck import recipe
from limbeck.core import distiller
from limbeck.core.refused import Refused
from limbeck.data.digits import load
from limbeck.models.cnn import CNN
from limbeck.recipe import Recipe
from limbeck.run import Moment, Run, Stopped, resume

STEPS = 4  # of an epoch: 1257 // 300
TEACHER, STUDENT = {"name": "cnn", "widths": [4, 6]}, {"name": "cnn", "widths": [3, 4]}

TIMED = ("seconds", "asking")  # no two runs take the same


def plan(**changes: Any) -> Recipe:
    """The teacher learns for an epoch, then the student for two, under it and a running mean of itself."""
    return recipe.parse(
        {
            "data": "digits",
            "models": {
                "teacher": TEACHER,
                "student": STUDENT,
                "slow": {"mean_of": "student", "decay": 0.9},
            },
            "stages": [
                {"learner": "teacher", "epochs": 1, "batch": 300},
                {
                    "learner": "student",
                    "epochs": 2,
                    "batch": 300,
                    "labels": 100,
                    "terms": [
                        {"method": "fitnet", "tap": "stage1", "weight": 0.5},
                        {"method": "kd", "teacher": ["teacher", "slow"], "ramp": {"epochs": 2}},
                    ],
                },
            ],
            **changes,
        }
    )


def finish(run: Run) -> Path:
    for _ in run.moments():
        pass
    return run.folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMED} for record in metrics(folder)]


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in one sitting, finished: what every other run here is compared with."""
    run = Run(plan(), tmp_path_factory.mktemp("runs") / "whole")
    finish(run)
    return run


def ends_like(folder: Path, whole: Run) -> bool:
    weights = [load_file(where / "student.safetensors") for where in (folder, whole.folder)]
    results = [json.loads((where / "result.json").read_text()) for where in (folder, whole.folder)]
    for result in results:
        for final in (result, *result["stages"]):
            final.pop("seconds"), final.pop("asking")
    return same(*weights) and results[0] == results[1] and untimed(folder) == untimed(whole.folder)


# --- what a run leaves behind ---


def test_a_run_says_what_it_did_with_what(whole: Run) -> None:
    about = json.loads((whole.folder / "run.json").read_text())
    assert recipe.parse(about["recipe"]) == whole.plan
    assert (about["seed"], about["fingerprint"]) == (0, whole.fingerprint)
    assert about["environment"]["torch"] == torch.__version__ and about["environment"]["threads"] == 1


def test_it_writes_a_line_for_every_epoch(whole: Run) -> None:
    lines = metrics(whole.folder)
    assert [(line["stage"], line["epoch"], line["steps"]) for line in lines] == [
        (0, 0, 4),
        (1, 0, 4),
        (1, 1, 8),
    ]
    taught = {"task", "fitnet", "kd"}
    assert [set(line["losses"]) for line in lines] == [{"task"}, taught, taught]
    assert all(0 <= line["scores"]["accuracy"] <= 100 and line["seconds"] > 0 for line in lines)


def test_what_ships_is_the_trained_student_and_loads_into_a_plain_model(whole: Run) -> None:
    shipped = load_file(whole.folder / "student.safetensors")
    trained = whole.lab.models["student"]
    assert same(shipped, trained.state_dict())
    plain = CNN(10, widths=[3, 4])
    assert not same(plain.state_dict(), shipped)
    plain.load_state_dict(shipped)
    test = load().test
    x, y = test.rows(torch.arange(len(test)))
    with torch.no_grad():
        logits = plain.eval()(x)
        assert torch.equal(logits, trained.eval()(x))
    right = 100 * int((logits.argmax(1) == y).sum()) / len(y)
    assert whole.result is not None and whole.result["scores"]["test.accuracy"] == right


def test_every_stage_leaves_the_weights_that_it_trained(whole: Run) -> None:
    taught = load_file(whole.folder / "teacher.safetensors")
    assert same(taught, whole.lab.models["teacher"].state_dict())
    about = json.loads((whole.folder / "teacher.json").read_text())["about"]
    assert whole.result is not None
    assert about["scores"] == whole.result["stages"][0]["scores"] and about["learner"] == "teacher"


def test_its_result_is_of_what_ships(whole: Run) -> None:
    result = whole.result
    assert result is not None
    assert result["shipped"] == "student.safetensors"
    assert result["parameters"] == sum(p.numel() for p in CNN(10, widths=[3, 4]).parameters())
    assert result["scores"].keys() == {"valid.accuracy", "test.accuracy"}
    assert result["scores"]["valid.accuracy"] == metrics(whole.folder)[-1]["scores"]["accuracy"]
    assert result["seconds"] == pytest.approx(sum(line["seconds"] for line in metrics(whole.folder)[1:]))
    teacher, student = result["stages"]
    assert student == {key: value for key, value in result.items() if key not in ("shipped", "stages")}
    assert teacher["learner"] == "teacher"
    assert teacher["scores"]["valid.accuracy"] == metrics(whole.folder)[0]["scores"]["accuracy"]
    about = json.loads((whole.folder / "student.json").read_text())["about"]
    assert about["scores"] == result["scores"] and about["fingerprint"] == whole.fingerprint


def test_its_moments_tell_the_time(tmp_path: Path) -> None:
    moments = list(Run(plan(), tmp_path / "run").moments())
    assert [(m.stage, m.learner, m.epoch, m.epochs) for m in moments] == [
        *[(0, "teacher", 0, 1)] * STEPS,
        *[(1, "student", 0, 2)] * STEPS,
        *[(1, "student", 1, 2)] * STEPS,
    ]
    assert [m.done for m in moments] == [0.25, 0.5, 0.75, 1.0, *(n / 8 for n in range(1, 9))]
    assert [n for n, m in enumerate(moments) if m.record] == [3, 7, 11]


def test_a_run_is_repeatable_and_its_seed_matters(tmp_path: Path, whole: Run) -> None:
    assert ends_like(finish(Run(plan(), tmp_path / "again")), whole)
    other = finish(Run(plan(), tmp_path / "other", seed=1))
    assert not ends_like(other, whole)
    assert ends_like(finish(Run(plan(seed=1), tmp_path / "named")), Run(plan(), other, seed=1))


def test_initial_weights_are_fixed_by_seed_and_name(tmp_path: Path) -> None:
    def initial(name: str, seed: int = 0, **more: Any) -> dict[str, Tensor]:
        models = {"teacher": STUDENT, "student": STUDENT, "slow": {"mean_of": "student"}, **more}
        return Run(plan(models=models), tmp_path / "run", seed=seed).lab.models[name].state_dict()

    first = initial("student")
    assert same(initial("student", another=TEACHER), first)  # whoever else there is
    assert not same(initial("student", seed=1), first)
    assert not same(initial("teacher"), first)


# --- stop and go on ---


def stop(run: Run, k: int) -> str:
    """Train k batches, ask for a stop, and give the sentence that it stops with."""
    moments = run.moments()
    for _ in range(k):
        next(moments)
    run.stop()
    with pytest.raises(Stopped) as stopped:
        next(moments)
    return str(stopped.value)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 8, 11, 12])
def test_stopped_after_k_batches_and_resumed_it_ends_bit_identical(
    k: int, tmp_path: Path, whole: Run
) -> None:
    sentence = stop(Run(plan(), tmp_path / "run"), k)
    assert f"limbeck resume {tmp_path / 'run'}" in sentence
    assert not (tmp_path / "run" / "result.json").exists()
    again = resume(tmp_path / "run")
    left = list(again.moments())
    assert len(left) == 12 - k  # nothing is done twice
    assert ends_like(tmp_path / "run", whole)


def test_stopped_after_every_batch_it_ends_bit_identical(tmp_path: Path, whole: Run) -> None:
    stop(Run(plan(), tmp_path / "run"), 1)
    for _ in range(11):
        stop(resume(tmp_path / "run"), 1)
    assert ends_like(finish(resume(tmp_path / "run")), whole)


def test_the_same_recipe_goes_on_in_its_folder_without_being_asked_to_resume(
    tmp_path: Path, whole: Run
) -> None:
    stop(Run(plan(), tmp_path / "run"), 6)
    again = Run(plan(), tmp_path / "run")
    assert len(list(again.moments())) == 6
    assert ends_like(again.folder, whole)


@pytest.mark.parametrize("k", [1, 3, 4, 5, 6, 9, 12])
def test_killed_after_k_batches_it_goes_on_from_its_last_checkpoint(
    k: int, tmp_path: Path, whole: Run
) -> None:
    run = Run(plan(), tmp_path / "run", every=0)
    moments = run.moments()
    for _ in range(k):
        next(moments)
    moments.close()  # as a kill would: what was not saved is lost
    left = list(resume(tmp_path / "run").moments())
    assert len(left) == 12 - (k - 1)
    assert ends_like(tmp_path / "run", whole)


def test_killed_before_its_first_checkpoint_it_begins_again(tmp_path: Path, whole: Run) -> None:
    run = Run(plan(), tmp_path / "run")
    next(run.moments())
    assert len(list(resume(tmp_path / "run").moments())) == 12
    assert ends_like(tmp_path / "run", whole)


def test_killed_just_before_its_last_checkpoint_it_can_still_be_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Run
) -> None:
    """A board's shared stage, killed at its last breath, would else be finished and of no use to the arms."""
    shared = Run(
        plan(stages=[stage.model_dump(by_alias=True) for stage in plan().stages[:1]]), tmp_path / "shared"
    )
    write = shared._write

    def killed(name: str, content: dict[str, Any]) -> None:
        write(name, content)
        if name == "result.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(shared, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(shared)
    after = finish(Run(plan(), tmp_path / "run", after=shared.folder))
    assert same(load_file(after / "student.safetensors"), load_file(whole.folder / "student.safetensors"))


def test_what_is_made_from_a_model_is_made_alike_whenever_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = (
        "import copy\n"
        "def noisy(net):\n"
        "    net = copy.deepcopy(net)\n"
        "    net.head.reset_parameters()\n"
        "    return net\n"
    )
    (tmp_path / "makes_noise.py").write_text(noisy)
    monkeypatch.syspath_prepend(tmp_path)
    made = {"name": "made", "from": "student", "change": "makes_noise:noisy"}
    run = Run(plan(stages=[{"learner": made, "epochs": 1, "batch": 300}]), tmp_path / "run")
    first = run.lab.learners(run.plan.stages[0])["made"].state_dict()
    first = {name: value.clone() for name, value in first.items()}
    torch.rand(5)
    assert same(run.lab.learners(run.plan.stages[0])["made"].state_dict(), first)
    other = Run(plan(stages=[{"learner": made, "epochs": 1, "batch": 300}]), tmp_path / "other", seed=1)
    assert not same(other.lab.learners(other.plan.stages[0])["made"].state_dict(), first)


def test_a_finished_run_is_left_alone(whole: Run) -> None:
    before = files(whole.folder)
    for again in (Run(plan(), whole.folder), resume(whole.folder)):
        assert list(again.moments()) == []
        assert again.result == whole.result
    assert files(whole.folder) == before


def test_a_run_may_begin_after_anothers_first_stages(tmp_path: Path, whole: Run) -> None:
    first = plan(stages=[stage.model_dump(by_alias=True) for stage in plan().stages[:1]])
    finish(Run(first, tmp_path / "first"))
    before = files(tmp_path / "first")
    run = Run(plan(), tmp_path / "second", after=tmp_path / "first")
    moments: list[Moment] = list(run.moments())
    assert {m.stage for m in moments} == {1}
    assert same(
        load_file(run.folder / "student.safetensors"), load_file(whole.folder / "student.safetensors")
    )
    assert untimed(run.folder) == untimed(whole.folder)[1:]
    assert files(tmp_path / "first") == before


def test_a_run_that_began_after_another_resumes_by_itself(tmp_path: Path, whole: Run) -> None:
    first = plan(stages=[stage.model_dump(by_alias=True) for stage in plan().stages[:1]])
    finish(Run(first, tmp_path / "first"))
    stop(Run(plan(), tmp_path / "second", after=tmp_path / "first"), 3)
    run = Run(plan(), tmp_path / "second", after=tmp_path / "first")
    assert len(list(run.moments())) == 5
    assert same(
        load_file(run.folder / "student.safetensors"), load_file(whole.folder / "student.safetensors")
    )


# --- what is refused, and then nothing is touched ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        (
            {
                "models": {
                    "teacher": TEACHER,
                    "student": STUDENT | {"widths": [3, 5]},
                    "slow": {"mean_of": "student"},
                }
            },
            r"models.student.widths.1 is 4 there and 5 here",
        ),
    ],
)
def test_the_folder_of_another_recipe_is_refused_with_what_differs(
    changes: dict[str, Any], words: str, whole: Run
) -> None:
    before = files(whole.folder)
    with pytest.raises(Refused, match=f"holds a run of another recipe: .*{words}; choose another folder"):
        Run(plan(**changes), whole.folder)
    assert files(whole.folder) == before


def test_a_change_deep_in_a_stage_is_named_too(whole: Run) -> None:
    stages = [stage.model_dump(by_alias=True) for stage in plan().stages]
    stages[1]["terms"][1]["temperature"] = 2.0
    with pytest.raises(Refused, match=r"stages.1.terms.1.temperature is None there and 2.0 here"):
        Run(plan(stages=stages), whole.folder)


def test_another_recipes_checkpoint_is_refused(tmp_path: Path, whole: Run) -> None:
    stop(Run(plan(seed=1), tmp_path / "run"), 1)
    (tmp_path / "run" / "run.json").write_bytes((whole.folder / "run.json").read_bytes())
    with pytest.raises(Refused, match=r"checkpoint.json.*a checkpoint of recipe \w+, expected recipe \w+"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "bad", "words"),
    [
        (
            1,
            {"terms": [{"method": "fitnet", "tap": "stage9"}]},
            "In stage 1: .*'stage9' does not exist.*stage1",
        ),
        (1, {"terms": [{"method": "kd", "temperature": -1.0}]}, "temperature.*-1"),
        (1, {"labels": 5000}, "budget of 5000 .*1257"),
        (1, {"labels": 0, "rows": "labelled"}, "0 inputs"),
        (0, {"optim": {"critic": {}}}, "In stage 0: `optim.critic` names no player; the players are student"),
        (0, {"learner": "slow"}, "'slow' is a teacher without a network"),
        (0, {"accumulate": 2, "terms": [{"method": "rkd", "teacher": "student"}]}, "'rkd' compares the rows"),
    ],
)
def test_when_a_stage_does_not_fit_nothing_is_written(
    stage: int, bad: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stages = [stage.model_dump(by_alias=True) for stage in plan().stages]
    stages[stage] |= bad
    with pytest.raises(Refused, match=words) as refusal:
        Run(plan(stages=stages), tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (STUDENT | {"weights": "nowhere.safetensors"}, "nowhere.safetensors.*cannot be read"),
        (STUDENT | {"depth": 0}, "student"),
        (STUDENT | {"channels": 3}, "student.*channels = 3"),
        (STUDENT | {"classes": 7}, r"label 9, and the model's head has 7 outputs"),
    ],
)
def test_when_a_model_does_not_fit_nothing_is_written(
    student: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=words) as refusal:
        Run(
            plan(models={"teacher": TEACHER, "student": student, "slow": {"mean_of": "student"}}),
            tmp_path / "run",
        )
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_begin_where_a_file_says_and_are_refused_when_they_do_not_fit(
    tmp_path: Path, whole: Run
) -> None:
    weights = str(whole.folder / "student.safetensors")
    models: dict[str, Any] = {"teacher": STUDENT | {"weights": weights}, "student": STUDENT}
    stages = [{"learner": "student", "epochs": 1, "terms": [{"method": "kd"}]}]
    run = Run(plan(models=models, stages=stages), tmp_path / "run")
    assert same(run.lab.models["teacher"].state_dict(), load_file(weights))
    models["teacher"] = TEACHER | {"weights": weights}
    with pytest.raises(
        Refused, match=r"does not fit model 'teacher': '[\w.]+' is \([\d, ]+\), expected \([\d, ]+\)"
    ):
        Run(plan(models=models, stages=stages), tmp_path / "no")


def test_a_run_knows_its_weights_by_what_is_in_them(tmp_path: Path, whole: Run) -> None:
    """The recipe says only where they are: what another training left there is another run."""
    file = tmp_path / "teacher.safetensors"
    models = {"teacher": TEACHER | {"weights": str(file)}, "student": STUDENT}
    stages = [{"learner": "student", "epochs": 1, "batch": 300, "terms": [{"method": "kd"}]}]
    own = plan(models=models, stages=stages)
    file.write_bytes((whole.folder / "teacher.safetensors").read_bytes())
    first = Run(own, tmp_path / "run")
    stop(first, 1)
    file.rename(tmp_path / "moved")
    file.write_bytes((tmp_path / "moved").read_bytes())  # another file of the same bytes
    assert Run(own, tmp_path / "run").fingerprint == first.fingerprint
    weights = load_file(file)
    weights["head.bias"] += 1
    save_file(weights, file)
    before = files(tmp_path / "run")
    for begin in (lambda: Run(own, tmp_path / "run"), lambda: resume(tmp_path / "run")):
        with pytest.raises(Refused, match=r"run of this recipe, and the weights of 'teacher' have changed"):
            begin()
    assert files(tmp_path / "run") == before


def test_without_files_the_recipe_and_the_seed_are_all_that_a_run_is_known_by(whole: Run) -> None:
    """So folders from before files were noted still belong to their runs."""
    assert whole.fingerprint == whole.plan.fingerprint


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"holds no run \(it has no run.json\)"):
        resume(tmp_path)


@pytest.mark.parametrize("text", ['{"fingerpr', "{}", "[]"], ids=["cut", "not-ours", "list"])
def test_a_run_json_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    for begin in (lambda: resume(tmp_path), lambda: Run(plan(), tmp_path)):
        with pytest.raises(Refused, match=r"run.json"):
            begin()
    assert (tmp_path / "run.json").read_text() == text


def damaged(whole: Run, place: Path, name: str, text: str) -> Path:
    """A copy of the finished run, one of its files as `text`."""
    folder = shutil.copytree(whole.folder, place / "run")
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "lacks shipped, scores"), ('{"scores": ', "cannot be read"), ("[]", "lacks shipped")],
)
def test_a_damaged_result_is_refused(text: str, words: str, tmp_path: Path, whole: Run) -> None:
    folder = damaged(whole, tmp_path, "result.json", text)
    with pytest.raises(Refused, match=rf"result.json .*{words}.*restore it from a copy") as refusal:
        finish(resume(folder))
    assert "\n" not in str(refusal.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "base.toml"
    file.write_text("x = 1")
    for begin in (
        lambda: Run(plan(), file),
        lambda: Run(plan(), file / "deep" / "er"),
        lambda: resume(file),
    ):
        with pytest.raises(Refused, match=r"base.toml is a file, expected a folder .* choose another"):
            begin()
    assert file.read_text() == "x = 1"


@pytest.mark.parametrize("name", ["cells", "shared"])
def test_a_run_has_no_place_in_a_boards_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "b" / name).mkdir(parents=True)
    with pytest.raises(Refused, match=r"b holds a board, .* choose another folder"):
        Run(plan(), tmp_path / "b")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    stop(Run(plan(), tmp_path / "run"), 1)
    (tensors,) = (tmp_path / "run").glob("checkpoint-*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    with pytest.raises(Refused, match=f"{tensors.name}.*changed contents"):
        resume(tmp_path / "run")


def test_a_run_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refused, match=r"2 processes.*without torchrun"):
        Run(plan(), tmp_path / "run")


def test_a_loss_that_is_no_longer_finite_ends_the_run_and_ships_nothing(tmp_path: Path) -> None:
    stages = [stage.model_dump(by_alias=True) for stage in plan().stages[:1]]
    stages[0]["optim"] = {"student": {"lr": 1e30}}
    with pytest.raises(Refused, match=r"The loss 'task' of player 'student' became .* lower the learning"):
        finish(Run(plan(stages=stages), tmp_path / "run"))
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "run" / "result.json").exists()


def test_a_network_learns_in_channels_last_unless_its_recipe_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distiller, "learns_last", lambda *_: True)  # digits have one channel
    shy = {"teacher": TEACHER, "student": {**STUDENT, "channels_last": False}}
    run = Run(plan(models={**shy, "slow": {"mean_of": "student"}}), tmp_path / "run")
    finish(run)
    assert [final["learned"] for final in run.finals] == [["channels_last"], []]
