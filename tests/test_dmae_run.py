"""DMAE from a recipe: a teacher without labels, a student under it, and what its encoder becomes."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck import build, recipe
from limbeck.core.refused import Refused
from limbeck.run import Run, records

TEXT = """
data = "digits"

[models.teacher]
name = "mae"
patch = 2
width = 12
depth = 4
heads = 2
decoder_width = 8
decoder_depth = 1
decoder_heads = 2
view = { name = "mask", patch = 2 }

[models.student]
name = "mae"
patch = 2
width = 8
depth = 2
heads = 2
decoder_width = 8
decoder_depth = 1
decoder_heads = 2

[[stages]]
learner = "teacher"
task = "reconstruct"
view = { name = "mask", patch = 2 }
epochs = 1
batch = 256

[[stages]]
learner = "student"
task = { name = "reconstruct", norm_pix = true }
view = { name = "mask", patch = 2 }
epochs = 2
batch = 256
terms = [{ method = "dmae", weight = 10 }]
optim.student = { name = "adamw", lr = 0.01, weight_decay = 0 }

[[stages]]
learner = { name = "tuned", from = "student", change = "limbeck.models.autoencoder:encoder" }
epochs = 1
labels = 50
rows = "labelled"

[[stages]]
learner = { name = "probe", from = "student", change = "limbeck.models.autoencoder:probe" }
epochs = 1
labels = 50
rows = "labelled"
"""


def plan(*changes: str) -> recipe.Recipe:
    content: dict[str, Any] = tomllib.loads(TEXT)
    return recipe.parse(recipe.apply(content, changes))


def test_a_recipe_goes_from_pixels_to_a_classifier(tmp_path: Path) -> None:
    run = Run(plan(), tmp_path / "run")
    for _ in run.moments():
        pass
    stages = run.result["stages"]  # type: ignore[index]
    assert [("test.psnr" in s["scores"], "test.accuracy" in s["scores"]) for s in stages] == [
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]
    first, second = records(tmp_path / "run", 1)
    assert second["losses"]["dmae"] < first["losses"]["dmae"]
    assert second["figures"]["dmae.cosine"] > first["figures"]["dmae.cosine"]
    student, tuned, probe = (run.lab.model(name).encoder for name in ("student", "tuned", "probe"))
    same = [torch.equal(a, b) for a, b in zip(student.parameters(), probe.parameters(), strict=True)]
    assert all(same), "the probe begins with the student's encoder, not with what was tuned, and leaves it"
    assert not torch.equal(tuned.embed.weight, student.embed.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stages.1.view=[]", "Nothing is hidden from the model"),
        ("models.teacher.view=[]", "the same view"),
        ("models.teacher.view.ratio=0.5", "the same view"),
        ("stages.1.view.patch=4", "give the view `mask` the model's size of a patch"),
        ("stages.1.view.ratio=0.0", "the share 0.0"),
        ("models.student.patch=3", "size 8 and patches of 3"),
        ("stages.2.learner.from=tuned2", "no model of this recipe"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(change: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        build.rehearse(plan(change))
    assert "\n" not in str(caught.value)
