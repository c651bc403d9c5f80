"""The command line: the happy paths, and every way to interrupt one and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck import checkpoint, recipe, registry
from limbeck.cli import main

ROOT = Path(__file__).parent.parent

Said = tuple[int, str, str]  # exit code, stdout, stderr
Cli = Callable[..., Said]

RECIPE = """
data = "digits"
models = { teacher = { name = "cnn", widths = [4] }, student = { name = "slow_net:net", widths = [3] } }

[[stages]]
learner = "teacher"
epochs = 1
batch = 300

[[stages]]
learner = "student"
epochs = 3
batch = 300
terms = [{ method = "kd" }]
"""

# A plain CNN that may be told to dawdle from the student's second epoch on, or to press Ctrl-C at a step. It
# counts its training steps; the first two are those of the dry batches, before the stage and before the run.
SLOW_NET = """
import os, signal, time
from limbeck.models.cnn import CNN

class Net(CNN):
    steps = 0

    def forward(self, x):
        if self.training:
            Net.steps += 1
            time.sleep(float(os.environ.get("DAWDLE", 0)) * (Net.steps > 6))
            for name, step in [pair.split(":") for pair in os.environ.get("PRESS", "").split()]:
                if Net.steps == int(step):
                    signal.raise_signal(signal.Signals[name])
        return super().forward(x)

def net(classes: int, channels: int, widths: list[int]):
    return Net(classes, channels, widths)
"""


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`limbeck …` in this process; anything but a proper end is an error of the test."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a recipe and a network of its own on the path."""
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "slow_net.py").write_text(SLOW_NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("slow_net", None)
    return tmp_path


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The student of a run that nobody interrupted."""
    from limbeck.run import Run

    folder = tmp_path_factory.mktemp("whole")
    (folder / "slow_net.py").write_text(SLOW_NET)
    sys.path.insert(0, str(folder))
    try:
        run = Run(recipe.parse(recipe.tomllib.loads(RECIPE)), folder / "run")
        for _ in run.moments():
            pass
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("slow_net", None)
    return (folder / "run" / "student.safetensors").read_bytes()


def one_sentence(err: str) -> bool:
    return err.startswith("limbeck: ") and err.count("\n") == 1 and "Traceback" not in err


# --- happy paths ---


def test_run_trains_and_says_where_it_is_and_what_ships(cli: Cli, place: Path, shipped: bytes) -> None:
    code, out, err = cli("run", "small.toml")
    assert (code, err) == (0, "")
    assert (place / "runs" / "small" / "student.safetensors").read_bytes() == shipped
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [
        "stage 0 (teacher), epoch 1/1",
        *(f"stage 1 (student), epoch {n}/3" for n in (1, 2, 3)),
    ]
    assert "task" in lines[1] and "kd" in lines[1] and "accuracy" in lines[1]
    scores = json.loads((place / "runs" / "small" / "result.json").read_text())["scores"]
    assert f"{scores['test.accuracy']:.2f}" in lines[4] and "parameters" in lines[4]
    assert "Shipped:" in lines[5] and "student.safetensors" in out


def test_run_takes_a_folder_a_seed_and_changes(cli: Cli, place: Path) -> None:
    changes = ("--set", "stages.1.epochs=1", "--set", "stages.1.terms=[]")
    assert cli("run", "small.toml", "--out", "here", "--seed", 5, *changes)[0] == 0
    about = json.loads((place / "here" / "run.json").read_text())
    assert about["seed"] == 5
    assert about["recipe"]["stages"][1]["epochs"] == 1 and about["recipe"]["stages"][1]["terms"] == []
    assert not (place / "runs").exists()


def test_a_finished_run_says_so_and_does_nothing(cli: Cli, place: Path) -> None:
    cli("run", "small.toml")
    before = {p: p.stat().st_mtime_ns for p in (place / "runs" / "small").iterdir()}
    for again in (cli("run", "small.toml"), cli("resume", "runs/small")):
        assert again[0] == 0
        assert "finished" in again[1] and "Shipped:" in again[1]
    assert {p: p.stat().st_mtime_ns for p in (place / "runs" / "small").iterdir()} == before


def test_board_computes_a_table_and_a_report(cli: Cli, place: Path) -> None:
    code, out, err = cli(
        "board", "small.toml", "--methods", "kd, rkd", "--seeds", 1, "--set", "stages.1.epochs=1"
    )
    assert (code, err) == (0, "")
    folder = place / "runs" / "small"
    assert [line.split("]")[0] for line in out.splitlines()[:4]] == [f"[{n}/4" for n in (1, 2, 3, 4)]
    for name in ("control", "kd", "rkd"):
        assert name in out.split("[4/4]")[1]
    assert f"Report: {Path('runs') / 'small' / 'report.html'}" in out
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert [arm["name"] for arm in json.loads((folder / "board.json").read_text())["arms"]] == [
        "control",
        "kd",
        "rkd",
    ]


@pytest.mark.parametrize("kind", [k for k in registry.KINDS if k != "method"])
def test_list_names_what_there_is_of_a_kind(kind: str, cli: Cli) -> None:
    code, out, _ = cli("list", kind)
    assert code == 0
    assert out.split() == list(registry.names(kind))


def test_list_shows_every_method_with_its_card(cli: Cli) -> None:
    code, out, _ = cli("list")
    assert code == 0
    for name in registry.names("method"):
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        card = registry.find("method", name).card
        for word in (str(card.year), card.paper, *card.knowledge, *card.taps, *card.needs):
            assert word in line


def test_show_prints_a_methods_page(cli: Cli) -> None:
    code, out, _ = cli("show", "kd")
    assert code == 0
    assert "Hinton" in out and "arXiv:1503.02531 (2015)" in out
    assert "Departures" in out and "temperature: float = 4.0" in out
    assert "same_classes" in out


@pytest.mark.parametrize(
    ("name", "words"), [("logit_standard", "arXiv:2403.01427"), ("online", "in_turn: bool")]
)
def test_show_prints_the_page_of_a_lens_and_of_a_scheme(name: str, words: str, cli: Cli) -> None:
    code, out, _ = cli("show", name)
    assert code == 0
    assert words in out and "Knobs:" in out and "cast" not in out.split("Knobs:")[1]


def test_show_tells_who_learns_what_in_a_recipe(cli: Cli, place: Path) -> None:
    code, out, _ = cli("show", "small.toml")
    assert code == 0
    assert "stage 1 (student): L = 1 · task(classify) + 1 · kd(teacher, temperature=4)\n" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet56", ["Deep Residual Learning", "  widths: "]),
        ("noise", ["Mean Teacher", "  sd: float = 0.15"]),
        ("digits", ["Handwritten digits"]),
        ("retrieve", ["triplet loss"]),
        ("online", ["Deep Mutual Learning", "  in_turn: bool = False"]),
    ],
)
def test_show_tells_about_anything_with_a_name(name: str, words: list[str], cli: Cli) -> None:
    code, out, err = cli("show", name)
    assert (code, err) == (0, "") and all(word in out for word in words)
    filled_in = ("  classes", "  channels", "  batch", "  cast", "  margin")
    assert not any(line.startswith(filled_in) for line in out.partition("Knobs:")[2].splitlines())


@pytest.mark.parametrize("kind", ["lens", "data", "model", "view"])
def test_list_takes_the_plural(kind: str, cli: Cli) -> None:
    plural = f"{kind}es" if kind == "lens" else f"{kind}s"
    assert cli("list", plural) == cli("list", kind)
    assert cli("list", kind)[1].splitlines() == list(registry.names(kind))


def test_schema_is_printed_or_written(cli: Cli, place: Path) -> None:
    code, out, _ = cli("schema")
    assert code == 0 and "stages" in json.loads(out)["properties"]
    code, out, _ = cli("schema", "--board", "--out", "board.schema.json")
    assert code == 0 and "#:schema board.schema.json" in out
    assert "arms" in json.loads((place / "board.schema.json").read_text())["properties"]


def test_new_writes_a_pair_that_a_recipe_takes(cli: Cli, place: Path) -> None:
    code, out, err = cli("new", "method", "fresh", "--kind", "response", "--outside", "mine")
    assert (code, err) == (0, "")
    assert "mine/fresh.py" in out and '{ method = "fresh:Fresh" }' in out
    assert (place / "mine/test_fresh.py").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("method", "Fresh", "--kind", "response"), "cannot be a method's name"),
        (("method", "fresh", "--kind", "logits"), "no kind 'logits'"),
        (("scheme", "fresh", "--kind", "response"), "no template of 'scheme'"),
    ],
)
def test_new_refuses_in_a_sentence(arguments: tuple[str, ...], words: str, cli: Cli, place: Path) -> None:
    before = set(place.iterdir())
    code, _, err = cli("new", *arguments)
    assert code == 2 and one_sentence(err) and words in err
    assert set(place.iterdir()) == before


def test_show_writes_out_every_default_of_a_recipe(cli: Cli, place: Path) -> None:
    code, out, _ = cli("show", "small.toml", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["stages"][0]["task_weight"] == 1.0 and told["stages"][1]["terms"][0]["teacher"] == ["teacher"]
    assert recipe.parse(told) == recipe.read(place / "small.toml")


def test_without_a_command_it_says_what_there_is(cli: Cli) -> None:
    assert cli("--help")[0] == 0
    told = cli()[1] + cli()[2]
    for command in ("run", "resume", "board", "list", "show", "schema", "new"):
        assert command in told


# --- Ctrl-C, SIGTERM and kill ---


@pytest.mark.parametrize(("name", "step"), [("SIGINT", 1), ("SIGTERM", 7)])
def test_a_stop_is_one_sentence_and_code_130_and_resume_ends_the_same(
    name: str, step: int, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, shipped: bytes
) -> None:
    monkeypatch.setenv("PRESS", f"{name}:{2 + step}")
    code, _, err = cli("run", "small.toml")
    assert code == 130
    assert one_sentence(err) and f"stage 1 after step {step};" in err and "limbeck resume runs/small" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the shell's again
    assert not (place / "runs" / "small" / "result.json").exists()

    monkeypatch.setenv("PRESS", "")
    code, _, err = cli("resume", "runs/small")
    assert (code, err) == (0, "")
    assert (place / "runs" / "small" / "student.safetensors").read_bytes() == shipped


def test_a_second_ctrl_c_does_not_wait_for_the_batch(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, shipped: bytes
) -> None:
    monkeypatch.setenv("PRESS", "SIGINT:5 SIGINT:5")
    code, _, err = cli("run", "small.toml", "--every", "0")
    assert code not in (0, 2) and "Stopped" not in err and "Traceback" not in err
    monkeypatch.setenv("PRESS", "")
    assert cli("resume", "runs/small")[0] == 0
    assert (place / "runs" / "small" / "student.safetensors").read_bytes() == shipped


def test_methods_that_name_nothing_are_refused(cli: Cli, place: Path) -> None:
    code, _, err = cli("board", "small.toml", "--methods", " ,")
    assert code == 2 and one_sentence(err) and "names no method" in err
    assert not (place / "runs").exists()


def test_a_stopped_board_says_to_start_it_again_and_then_ends(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = ("board", "small.toml", "--seeds", 1, "--set", "stages.1.epochs=1")
    monkeypatch.setenv("PRESS", "SIGINT:7")  # after the rehearsals of both arms and some batches
    code, _, err = cli(*board)
    assert code == 130
    assert one_sentence(err) and "the same command goes on" in err
    assert not (place / "runs" / "small" / "board.json").exists()

    monkeypatch.setenv("PRESS", "")
    code, out, err = cli(*board)
    assert (code, err) == (0, "") and "Report:" in out


def started(place: Path, *options: str) -> "subprocess.Popen[str]":
    """A real `limbeck run` that is in the middle of the student's second epoch."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{place}", "DAWDLE": "0.5"}
    command = [sys.executable, "-m", "limbeck.cli", "run", "small.toml", *options]
    process = subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = place / "runs" / "small" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") == 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


def test_a_real_ctrl_c(cli: Cli, place: Path, shipped: bytes) -> None:
    process = started(place)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert one_sentence(err) and "limbeck resume runs/small" in err
    assert not (place / "runs" / "small" / "result.json").exists()
    assert cli("resume", "runs/small")[0] == 0
    assert (place / "runs" / "small" / "student.safetensors").read_bytes() == shipped


def test_a_real_kill(cli: Cli, place: Path, shipped: bytes) -> None:
    process = started(place, "--every", "0")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (place / "runs" / "small" / "result.json").exists()
    state = checkpoint.load(place / "runs" / "small")
    assert (
        state["stage"] == 1 and state["engine"]["step"] >= 3
    )  # of the batch that was done, or of the one before
    assert cli("resume", "runs/small")[0] == 0
    assert (place / "runs" / "small" / "student.safetensors").read_bytes() == shipped
