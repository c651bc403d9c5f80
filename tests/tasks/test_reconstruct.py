"""Reconstruction: the error of hidden patches alone, and a score under masks of its own."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Lesson
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.engine import evaluate
from limbeck.pieces.patches import patchify
from limbeck.tasks.reconstruct import Reconstruct
from limbeck.views.mask import mask

X = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
SAID = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(1))


def masked(x: Tensor = X) -> Batch:
    return mask(Batch(x, index=torch.arange(len(x)), lesson=Lesson(seed=1)), patch=2)


def slow(said: Tensor, batch: Batch, norm_pix: bool = False) -> float:
    """Row by row, patch by patch, pixel by pixel."""
    gaps = []
    for row, hidden in enumerate(batch.x["hide"].tolist()):
        for n in hidden:
            top, left = 2 * (n // 4), 2 * (n % 4)
            there = batch.x["x"][row, :, top : top + 2, left : left + 2].permute(1, 2, 0).flatten().tolist()
            if norm_pix:
                mean = sum(there) / 8
                spread = math.sqrt(sum((v - mean) ** 2 for v in there) / 7 + 1e-6)
                there = [(v - mean) / spread for v in there]
            gaps.append(sum((a - b) ** 2 for a, b in zip(said[row, n].tolist(), there, strict=True)) / 8)
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_loss_is_the_mean_over_hidden_patches_of_the_mean_over_their_pixels(norm_pix: bool) -> None:
    batch = masked()
    loss = Reconstruct(norm_pix).loss(Seen(SAID), batch)
    assert loss.item() == pytest.approx(slow(SAID, batch, norm_pix), rel=1e-5)


def test_visible_patches_do_not_count_and_hidden_ones_do() -> None:
    batch, task = masked(), Reconstruct()
    loss = task.loss(Seen(SAID), batch)
    for ids, counts in (("keep", False), ("hide", True)):
        where = torch.zeros(6, 16, dtype=torch.bool).scatter(1, batch.x[ids], True)
        other = torch.where(where[:, :, None], SAID + 1, SAID)
        assert bool(task.loss(Seen(other), batch) != loss) == counts
    said = SAID.clone().requires_grad_()
    task.loss(Seen(said), batch).backward()
    assert int((said.grad != 0).any(2).sum()) == 6 * 12


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    batch, task = masked(), Reconstruct()
    rows = [task.loss(Seen(SAID[i : i + 1]), part) for i, part in enumerate(batch.split(6))]
    torch.testing.assert_close(task.loss(Seen(SAID), batch), torch.stack(rows).mean())
    assert task.per_sample


class Tells(nn.Module):
    """Says the true pixels of every patch, each off by `off`; notes what it was shown."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off, self.kept = off, []

    def forward(self, x: Tensor, keep: Tensor | None = None, hide: Tensor | None = None) -> Tensor:
        if keep is not None:
            self.kept.append(keep)
        return patchify(x, 2) + self.off


def scored(model: nn.Module, rows: int, task: Reconstruct) -> float:
    batches = [Batch(X[n : n + rows], None, torch.arange(n, min(n + rows, 6))) for n in range(0, 6, rows)]
    return evaluate(model, task, iter(batches))["psnr"]


def test_the_score_is_the_signal_to_noise_ratio_of_what_was_hidden() -> None:
    model = Tells(0.1)
    score = scored(model, 6, Reconstruct())
    hidden = torch.ones(6, 16, dtype=torch.bool).scatter(1, model.kept[0], False)
    there = patchify(X, 2)[hidden]
    assert score == pytest.approx(20 * math.log10(float(there.max() - there.min()) / 0.1), rel=1e-4)
    assert scored(Tells(0.01), 6, Reconstruct()) == pytest.approx(score + 20, rel=1e-4)
    assert scored(Tells(0.0), 6, Reconstruct()) > 300, "nothing is wrong, and it is a number all the same"


def test_the_score_is_under_a_mask_for_each_image_whatever_its_batch() -> None:
    whole, parts = Tells(0.1), Tells(0.1)
    assert scored(whole, 6, Reconstruct(ratio=0.5)) == pytest.approx(
        scored(parts, 4, Reconstruct(ratio=0.5)), rel=1e-6
    )
    (kept,) = whole.kept
    assert kept.shape == (6, 8) and torch.equal(torch.cat(parts.kept), kept)
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1


def test_what_is_shown_masked_is_scored_as_it_is() -> None:
    batch = masked()
    score = Reconstruct().score([(Seen(SAID, model=None), batch)])["psnr"]
    there = patchify(X, 2).gather(1, batch.x["hide"][:, :, None].expand(-1, -1, 8))
    assert score == pytest.approx(10 * math.log10(float(there.max() - there.min()) ** 2 / slow(SAID, batch)))


def test_a_higher_score_is_less_noise() -> None:
    assert Reconstruct.headline == "psnr"
    assert scored(Tells(0.1), 6, Reconstruct()) > scored(Tells(0.2), 6, Reconstruct())


def test_the_check_passes_what_fits() -> None:
    Reconstruct().check(Seen(SAID), masked())


@pytest.mark.parametrize(
    ("out", "batch", "said"),
    [
        (SAID, Batch(X, index=torch.arange(6)), "Nothing is hidden.*view = { name = 'mask'"),
        (SAID, Batch({"x": X}, index=torch.arange(6)), "Nothing is hidden"),
        (SAID[:, :4], masked(), r"shape \(6, 4, 8\).*expects .*\(6, 16, 8\)"),
        (X.flatten(1), masked(), r"shape \(6, 128\)"),
        ({"pixels": SAID}, masked(), "has dict"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(out: object, batch: Batch, said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        Reconstruct().check(Seen(out), batch)
    assert "\n" not in str(caught.value)
