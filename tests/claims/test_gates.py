"""Gates on real data: what the claims boards showed must hold again under seeds that no board used.

They are the safe ones: a mechanism, or a gain far beyond the spread over seeds. Fashion-MNIST has to be there
or to be had; each board is run with the arms that its gate compares.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from limbeck import board, build
from limbeck.core.refused import Refused

RECIPES = Path(__file__).parents[2] / "recipes/claims"
SEEDS = [40, 41, 42]


def arms(name: str, folder: Path, chosen: Sequence[str], changes: Sequence[str] = ()) -> dict[str, Any]:
    """The rows of a claims board by arm, under fresh seeds."""
    whole, every, _, how = board.read(RECIPES / f"{name}.toml", tuple(changes))
    try:
        build.splits(whole.data)
    except Refused as missing:
        pytest.skip(str(missing))
    table = board.Board(whole, {arm: every[arm] for arm in chosen}, SEEDS, folder / name, **how)
    for _ in table.moments():
        pass
    return {row["name"]: row for row in table.result()["arms"]}


def mean(row: dict[str, Any]) -> float:
    return statistics.fmean(row["scores"])


@pytest.mark.slow
def test_dpk_gives_less_as_features_come_to_be_alike(tmp_path: Path) -> None:
    rows = arms("dpk", tmp_path, ["dpk, small"], ["stages.3.epochs=8"])
    for curve in rows["dpk, small"]["curves"]:
        first, *_, last = (record["figures"]["dpk.ratio.stage3"] for record in curve)
        assert 0 < last < first / 2
    assert mean(rows["dpk, small"]) > mean(rows["control"]) - 2


@pytest.mark.slow
def test_rtk_with_all_keys_beats_plain_training(tmp_path: Path) -> None:
    rows = arms("rtk", tmp_path, ["rtk-all"])
    assert mean(rows["rtk-all"]) > mean(rows["control"]) + 1


@pytest.mark.slow
def test_hints_of_clustered_layers_beat_plain_training(tmp_path: Path) -> None:
    rows = arms("pursuhint", tmp_path, ["at clustered"])
    assert mean(rows["at clustered"]) > mean(rows["control"]) + 1
    for taps in (hints["1.1"] for hints in rows["at clustered"]["hints"]):
        assert [tap.partition(".")[0] for tap in taps.values()] == ["layer1", "layer2", "layer3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The branches of 'frozen' mistake how:UserWarning")  # a bag has no top
def test_hssakd_beats_plain_training_and_learns_turns_without_a_label(tmp_path: Path) -> None:
    rows = arms("hssakd", tmp_path, ["hssakd, joint teacher"])
    assert mean(rows["hssakd, joint teacher"]) > mean(rows["control"])
    for curve in rows["hssakd, joint teacher"]["curves"]:
        mistaken = [record["figures"]["turns mistaken"] for record in curve]
        assert mistaken[-1] < 0.75 / 2  # by chance three in four are


@pytest.mark.slow
def test_dmae_reconstructs_better_and_agrees_with_its_teacher(tmp_path: Path) -> None:
    rows = arms("dmae", tmp_path, ["dmae"])
    ours, alone = (rows[name]["stages"][0] for name in ("dmae", "control"))
    assert ours["metric"] == "test.psnr"
    assert all(a > b for a, b in zip(ours["scores"], alone["scores"], strict=True))
    assert mean(rows["dmae"]) > mean(rows["control"]) - 1  # the probe
    for curve in rows["dmae"]["curves"]:
        assert curve[-1]["figures"]["dmae.cosine"] > curve[0]["figures"]["dmae.cosine"]


@pytest.mark.slow
def test_ten_stored_answers_teach_more_than_labels(tmp_path: Path) -> None:
    rows = arms("tinyvit", tmp_path, ["top 10", "wrong seeds"])
    assert mean(rows["top 10"]) > mean(rows["control"]) + 1
    assert mean(rows["top 10"]) > mean(rows["wrong seeds"])
