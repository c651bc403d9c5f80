"""The benchmarks cannot rot: what they time is compared by hand here, at sizes that cost nothing."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import breakdown, by_hand, memory, scaling, speed
from limbeck import registry
from limbeck.core.refused import Refused
from limbeck.knowledge.feature.cakd import CAKD
from limbeck.knowledge.feature.fitnet import FitNet

TINY = replace(speed.QUICK, rows=6, size=8, classes=5, samples=40, negatives=15, dtype=torch.float64)
TINY_FLOAT = replace(TINY, dtype=torch.float32)


def duel(name: str) -> speed.Duel:
    return speed.DUELS[name](TINY)


# --- both sides do the same ---


@pytest.mark.parametrize("name", speed.DUELS)
def test_a_step_of_ours_is_the_step_by_hand(name: str) -> None:
    """The loss, and all that learns or remembers: weights, BatchNorm statistics, banks."""
    both = duel(name)
    before = [value.clone() for value in speed.states(both.learners[0])]
    both.agree()
    moved = [not torch.equal(a, b) for a, b in zip(before, speed.states(both.learners[0]), strict=True)]
    assert all(moved[: len(list(both.learners[0][0].parameters()))])
    assert both.ours() is None, "the second step is timed, and keeps no record"


def test_a_step_that_differs_is_noticed() -> None:
    for spoil in ("weights", "loss"):
        both = duel("fitnet")
        student, criterion = both.learners[1]
        with torch.no_grad():
            if spoil == "loss":
                criterion.project.bias += 1e-3
            else:  # not read in training, so only what it leaves differs
                student.bn1.running_mean += 1e-3
        with pytest.raises(AssertionError, match="the loss is" if spoil == "loss" else "not close"):
            both.agree()


@pytest.mark.parametrize("name", ["cakd", "hssakd"])
def test_a_loop_of_its_own_is_compared_to_its_last_module(name: str) -> None:
    """The rival of CAKD, which learns by itself, and the head of HSSAKD's last branch."""
    both = duel(name)
    with torch.no_grad():
        list(both.learners[1][-1].parameters())[-1][0] += 1e-3
    with pytest.raises(AssertionError, match="the loss is"):
        both.agree()


def test_draws_of_cakd_are_shared_for_one_step_only() -> None:
    student, teacher = TINY.pair("cakd")
    between = by_hand.Across(student, teacher)
    x = torch.zeros(64, between.to_qkv.in_channels, 2, 2)
    between.dealt = dealt = torch.ones(1), torch.zeros(1)
    assert between.draw(x) is dealt
    crossing, kept = between.draw(x)
    assert crossing.shape == (3, 64, 3, 4, 64) and kept.shape == x.shape
    assert crossing.float().mean() == pytest.approx(0.5, abs=0.01)
    assert kept.float().mean() == pytest.approx(0.9, abs=0.01)


def test_neighbourhoods_by_hand_are_those_of_the_grid() -> None:
    """Place (row, column) of a 6x6 grid is of the neighbourhood (row // 4, column // 4), of four."""
    maps = by_hand.Neighbourhoods(inputs=2, outputs=3, grid=6)
    nn.init.normal_(maps.bias)
    x = torch.randn(5, 36, 2)
    found = maps(x)
    for row in range(6):
        for column in range(6):
            n = 2 * (row // 4) + column // 4
            place = 6 * row + column
            expected = x[:, place] @ maps.weight[n] + maps.bias[n]
            torch.testing.assert_close(found[:, place], expected)


def test_negatives_are_shared_for_one_step_only() -> None:
    """Then each side draws its own, and is timed at it."""
    both = duel("crd")
    criterion = both.learners[1][1]
    assert criterion.dealt.shape == (TINY.rows, TINY.negatives)
    both.agree()
    assert criterion.dealt is None


def test_negatives_by_hand_are_of_other_classes() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    nets = TINY.net(TINY.student), TINY.net(TINY.teacher)
    criterion = by_hand.CRD(*nets, labels, negatives=500)
    index = torch.tensor([0, 4, 5])
    drawn = criterion.draw(index)
    for row, found in zip(index, drawn, strict=True):
        assert set(found.tolist()) == set((labels != labels[row]).nonzero()[:, 0].tolist())


def test_gathered_scores_are_those_of_the_whole_bank() -> None:
    batch, nets = TINY.batch(), (TINY.net(TINY.student), TINY.net(TINY.teacher))
    one, other = (
        kind(*nets, batch.lesson.labels, TINY.negatives).to(TINY.dtype)
        for kind in (by_hand.CRD, by_hand.GatheredCRD)
    )
    other.load_state_dict(one.state_dict())
    s, t = ({"pooled": torch.randn(6, by_hand.widths(net)["pooled"], dtype=TINY.dtype)} for net in nets)
    one.dealt = other.dealt = one.draw(batch.index)
    torch.testing.assert_close(one(s, t, batch.index), other(s, t, batch.index))


# --- clocks and scales ---


def test_peak_counts_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(1000)
        second = torch.ones(500)
        del first
        return torch.cat([second, second, second])

    assert memory.peak(call) == (500 + 1500) * 4
    assert memory.peak(call) == (500 + 1500) * 4  # the same each time
    assert memory.peak(lambda: None) == 0


def test_peak_sees_inside_an_operation() -> None:
    """A sort keeps its indices beside its values; a view keeps nothing."""
    x = torch.zeros(1000)
    assert memory.peak(lambda: x.sort()) >= 1000 * (4 + 8)
    assert memory.peak(lambda: x.expand(1000, 1000)) == 0


def test_race_interleaves_and_takes_turns_in_being_first() -> None:
    called: list[str] = []
    times = speed.race([lambda: called.append("a"), lambda: called.append("b")], rounds=2)
    assert "".join(called) == "ba" + "ab" + "ba"
    assert [len(each) for each in times] == [2, 2]


def test_race_counts_cpu_and_not_waiting() -> None:
    def work() -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    (busy,), (idle,), (child,) = speed.race(
        [work, lambda: time.sleep(0.05), speed.command("-c", "for n in range(10**6): pass")], rounds=1
    )
    assert busy >= 0.05 > 5 * idle
    assert child > 0.01


def test_interval_holds_the_median_and_narrows() -> None:
    values = [1 + 0.01 * n for n in range(-5, 6)]
    low, high = speed.interval(values)
    assert low < 1 < high and values[0] <= low and high <= values[-1]
    closer_low, closer_high = speed.interval(values * 20)
    assert closer_high - closer_low < (high - low) / 2
    assert speed.interval([1.1] * 9) == (1.1, 1.1)
    # Of nine draws from 1 to 9, five or more are at most 2 in 3 % of cases, at most 3 in 14 %.
    assert speed.interval(range(1, 10)) == (3, 7)


# --- the verdict ---


def step(low: float, ours_mb: float = 100.0) -> speed.Step:
    return speed.Step(1.0, 1.0, 1.2, low, 1.3, ours_mb, 100.0, [1.2] * 9)


def test_fails_only_when_it_is_sure() -> None:
    figures = speed.Figures({}, {"sure": step(1.06), "unsure": step(1.04), "big": step(1.0, 105.1)})
    slow, big = figures.failures()
    assert slow == "a step of sure takes 1.200 of the time by hand (1.060 to 1.300)"
    assert big == "a step of big takes 105.1 MB, by hand 100.0"


def test_what_is_beyond_its_bound_fails() -> None:
    steps = {"kd": step(0.9), "kd, compiled": step(0.9), "two peers": step(0.9)}
    figures = speed.Figures({}, steps, promised={"crd loss (MB)": 60.0, "angles of 256 (MB)": 80.5})
    assert figures.bounded() == {
        "kd": (1.2, 0.87),
        "kd, compiled": (1.2, 0.80),
        "crd loss (MB)": (60.0, 60.0),
        "angles of 256 (MB)": (80.5, 80.0),
    }
    assert figures.failures() == [
        "kd is 1.200, expected 0.87 at most",
        "kd, compiled is 1.200, expected 0.8 at most",
        "angles of 256 (MB) is 80.500, expected 80.0 at most",
    ]


@pytest.mark.parametrize(
    ("words", "verdict"), [("--rounds 9", 1), ("--rounds 8", 0), ("--quick --rounds 9", 0)]
)
def test_only_a_whole_run_has_a_verdict(monkeypatch: pytest.MonkeyPatch, words: str, verdict: int) -> None:
    slow = speed.Figures({}, {"kd": step(1.06)})
    monkeypatch.setattr(speed, "measure", lambda scene, rounds, only: slow)
    assert speed.main(words.split()) == verdict


def test_losses_of_every_method_and_lens() -> None:
    costs = speed.loss_costs(TINY_FLOAT, rounds=1)
    assert costs.keys() == {*registry.names("method"), *(f"kd through {n}" for n in registry.names("lens"))}
    measured = {name: cost for name, cost in costs.items() if isinstance(cost, speed.Loss)}
    assert measured.keys() >= set(registry.names("method")), "each has a pair that it fits"
    assert all(cost.ms > 0 and cost.mb > 0 for cost in measured.values())
    # Student logits softened, teacher's softened, and so on: a handful of (rows, classes).
    logits = TINY.rows * TINY.classes * 4 / 1e6
    assert logits < measured["kd"].mb < 30 * logits
    assert measured["reviewkd"].mb > 10 * measured["kd"].mb
    assert speed._shown("dmae", TINY).x["hide"].shape == (TINY.rows, 3), "three patches of four"


def test_a_method_that_refuses_the_pair_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: nn.Module, *seen: object) -> None:
        raise Refused("Not these.")

    monkeypatch.setattr(FitNet, "build", build)
    costs = speed.loss_costs(TINY_FLOAT, rounds=1, only=["fitnet"])
    assert costs.keys() == {"fitnet", "kd"} and costs["fitnet"] == "Not these."


def test_the_loss_of_a_rival_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    rival_loss = CAKD.rival_loss

    def tell(self: CAKD, name: str, *seen: Any) -> torch.Tensor:
        told.append(name)
        return rival_loss(self, name, *seen)

    monkeypatch.setattr(CAKD, "rival_loss", tell)
    assert isinstance(speed.loss_costs(TINY_FLOAT, rounds=1, only=["cakd"])["cakd"], speed.Loss)
    assert told and set(told) == {"critic"}


LOSSES = {name: ({"task", name}, {"task", "kd"}) for name in ("dpk", "rtk", "afd")} | {
    "cakd": ({"task", "cakd", "cakd.critic"}, {"task", "kd"}),
    "dmae": ({"task", "dmae"}, {"task"}),
    "hssakd": ({"task", "kd", "stage1.kd", "stage2.kd", "stage3.kd"}, {"task", "kd"}),
    "hssakd, no branches": ({"task", "kd"}, {"task", "kd"}),
}


@pytest.mark.parametrize("name", ["cakd", "hssakd"])
def test_a_duel_is_of_the_whole_method(name: str) -> None:
    record = duel(name).ours()
    assert record is not None and record.losses.keys() == LOSSES[name][0]


@pytest.mark.parametrize("name", speed.WHOLE)
def test_a_whole_step_stands_beside_the_plain_one(name: str) -> None:
    first = [step() for step in speed.beside(name, TINY_FLOAT)]
    assert tuple(record.losses.keys() for record in first if record is not None) == LOSSES[name]


def test_a_whole_step_in_turns_is_of_four_times_the_rows() -> None:
    """The branches come on top. Memory is the same each time, and most of it is a row's."""
    assert 4 * speed.quartered(speed.QUICK).rows == speed.QUICK.rows, "turned, they are as many"
    plain, turned = (
        speed.whole_cost(name, replace(speed.QUICK, teacher="resnet8", rows=32), rounds=1)
        for name in ("hssakd, no branches", "hssakd")
    )
    assert 3 < plain.mb / plain.plain_mb < 4.5
    assert turned.mb > 1.1 * plain.mb and turned.plain_mb == pytest.approx(plain.plain_mb, rel=0.1)
    assert turned.ratio > 0 and turned.ms > 0 and turned.plain_ms > 0


@pytest.mark.parametrize(
    ("only", "names"),
    [([], speed.WHOLE), (["whole steps"], speed.WHOLE), (["rtk", "at"], ("rtk",)), (["at"], ())],
)
def test_whole_steps_are_asked_for_by_name_or_all_at_once(
    monkeypatch: pytest.MonkeyPatch, only: list[str], names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(speed, "DUELS", {})
    monkeypatch.setattr(speed, "loss_costs", lambda scene, rounds, only: {"kd": speed.Loss(1.0, 1.0)})
    monkeypatch.setattr(speed, "promised", lambda group, scene, rounds: {})
    monkeypatch.setattr(speed, "house", lambda rounds: {})
    monkeypatch.setattr(speed, "whole_cost", lambda name, scene, rounds: speed.Whole(2.0, 1.0, 2.0, 4.0, 1.0))
    assert tuple(speed.measure(TINY_FLOAT, 1, only).whole) == names


def test_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY_FLOAT)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    assert speed.main(["--quick", "--rounds", "1", "--only", "at,two peers,dpk", "--keep", "here"]) == 0
    kept = json.loads((tmp_path / "here.json").read_text())
    assert kept["steps"].keys() == {"at", "two peers"}
    assert kept["losses"].keys() == {"at", "dpk", "kd"}
    assert kept["whole"].keys() == {"dpk"} and kept["whole"]["dpk"]["ratio"] > 0
    assert kept["setting"]["threads"] == 1 and kept["setting"]["rounds"] == 1
    assert len(kept["setting"]["commit"].removesuffix("-dirty")) == 40
    out = capsys.readouterr().out
    assert "two peers" in out and "ours MB" in out


def test_every_promise_is_measured_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ", 500)
    angles = speed.angles
    monkeypatch.setattr(speed, "angles", lambda rounds: named(angles(rounds, (12, 24))))

    def named(found: dict[str, float]) -> dict[str, float]:
        return {name.replace("12", "256").replace("24", "512"): value for name, value in found.items()}

    small = replace(TINY, classes=12, dtype=torch.float32)
    found = {name: v for group in speed.GROUPS for name, v in speed.promised(group, small, 1).items()}
    assert found.keys() == speed.BOUNDS.keys() - speed.WEIGHTS.keys() - {"compiled"}
    assert all(value > 0 for value in found.values())


def test_stored_answers_spare_the_teacher() -> None:
    """Where the teacher is most of a step."""
    big = replace(TINY, teacher="resnet32x4", dtype=torch.float32)
    assert speed.stored_step(big, rounds=3)["stored / by hand"] < 0.8


def test_a_slope_is_that_of_the_last_two_sizes() -> None:
    assert scaling.Curve((1, 10, 100), [7.0, 2.0, 20.0], []).slope == pytest.approx(1)
    assert scaling.Curve((10, 40), [3.0, 6.0], []).slope == pytest.approx(0.5)


def test_a_reader_does_not_grow_with_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "READ", 640)
    found = scaling.readers((1000, 16_000), tmp_path, rounds=1)
    assert found.mb[1] == pytest.approx(found.mb[0], rel=0.1)


def test_curves_are_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scaling.Curve((1, 10), [1.0, 10.0], [0.5, 5.0])
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "measure", lambda rounds, quick: {"a loss, by rows": one})
    assert scaling.main(["--quick", "--rounds", "1", "--keep", "grows"]) == 0
    kept = json.loads((tmp_path / "grows.json").read_text())
    assert kept["curves"]["a loss, by rows"]["slope"] == pytest.approx(1)
    assert "a loss, by rows" in (tmp_path / "grows.svg").read_text()


def test_framework_cost_is_ours_over_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(by_hand.KD):
        def forward(self, s: by_hand.Looks, t: by_hand.Looks, index: torch.Tensor) -> torch.Tensor:
            return (
                super().forward(s, t, index) + sum(nn.functional.relu(index).sum() for _ in range(3000)) * 0
            )

    monkeypatch.setattr(by_hand, "KD", Slow)
    ours, hand = speed.framework_cost(steps=2, rounds=3)
    assert 0 < ours < hand


def test_the_parts_of_a_step_are_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert breakdown.main(["--quick"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:7]}
    assert tuple(rows) == (*breakdown.PARTS, "all")
    for column, place in ((0, 0), (2, 1)):
        told = sum(float(rows[part][column]) for part in breakdown.PARTS)
        assert told == pytest.approx(float(rows["all"][place]), abs=0.3)


def test_a_profile_names_what_the_step_is_made_of() -> None:
    spent = breakdown.operators(speed.QUICK)
    assert {"aten::mkldnn_convolution", "aten::convolution_backward"} <= {name for name, _, _ in spent}
    assert [ms for _, _, ms in spent] == sorted((ms for _, _, ms in spent), reverse=True)
