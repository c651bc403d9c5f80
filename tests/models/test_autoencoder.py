"""The masked autoencoder: what is hidden stays hidden and costs nothing, and what its encoder becomes."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from limbeck import registry
from limbeck.core.batch import Batch, Lesson
from limbeck.core.refused import Refused
from limbeck.core.scheme import to_work
from limbeck.core.taps import Tapped
from limbeck.models.autoencoder import MAE, MODELS, Classifier, encoder, positions, probe, unshuffle
from limbeck.models.cnn import CNN
from limbeck.pieces.patches import patchify, unpatchify
from limbeck.views.mask import mask

X = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = {"width": 12, "depth": 4, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def mae(seed: int = 0, **knobs: int) -> MAE:
    torch.manual_seed(seed)
    return MAE(5, **{"channels": 2, "size": 16, **SMALL, **knobs})


def masked(x: Tensor = X, ratio: float = 0.75, patch: int = 4) -> dict[str, Tensor]:
    return mask(Batch(x, index=torch.arange(len(x)), lesson=Lesson(seed=2)), ratio, patch).x


def seen(model: nn.Module, x: object, *taps: str) -> dict[str, Tensor]:
    tapped = Tapped(model)
    tapped.look(taps or model.TAPS)
    return {**tapped.check(x).at}


# --- sizes ---


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "count"),
    [
        ("mae_tiny", 192, 12, 3, 31_200_000),
        ("mae_small", 384, 12, 6, 47_401_728),
        ("mae_base", 768, 12, 12, 111_655_680),
        ("mae_large", 1024, 24, 16, 329_239_296),
    ],
)
def test_its_sizes_are_the_papers(name: str, width: int, depth: int, heads: int, count: int) -> None:
    def block(d: int) -> int:
        return 4 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 4 * d + (4 * d + 1) * d

    whole = (768 + 1) * width + width + depth * block(width) + 2 * width
    whole += (width + 1) * 512 + 512 + 8 * block(512) + 2 * 512 + (512 + 1) * 768
    with torch.device("meta"):
        model = MODELS[name](1000)
    assert sum(p.numel() for p in model.parameters()) == whole == count
    assert (model.encoder.grid, model.encoder.blocks[0].attention.heads) == ((14, 14), heads)
    assert len(model.encoder.blocks) == depth and len(model.decoder.blocks) == 8


def test_its_defaults_take_images_of_32() -> None:
    model = registry.find("model", "mae")(classes=7)
    out = model(**masked(torch.randn(1, 3, 32, 32)))
    assert out.shape == (1, 64, 48) and unpatchify(out, 3).shape == (1, 3, 32, 32)


# --- positions ---


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    """The column first, as the authors' code has it."""
    found = positions((2, 3), 8)
    for n in range(6):
        row, column = divmod(n, 3)
        slow = [
            wave(place / 10_000 ** (k / 2))
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for k in range(2)
        ]
        assert found[n].tolist() == pytest.approx(slow, abs=1e-6)


def test_positions_do_not_learn_and_are_no_weights() -> None:
    model = mae()
    assert not any("positions" in name for name in model.state_dict())
    assert not any("positions" in name for name, _ in model.named_parameters())


# --- what is hidden ---


def test_unshuffling_puts_every_kept_token_at_its_own_place() -> None:
    kept, keep = torch.randn(2, 3, 4), torch.tensor([[5, 0, 2], [1, 4, 3]])
    hidden = torch.full((1, 1, 4), 7.0)
    whole = unshuffle(kept, keep, hidden, 6)
    for row in range(2):
        for place in range(6):
            ids = keep[row].tolist()
            expected = kept[row, ids.index(place)] if place in ids else hidden[0, 0]
            assert torch.equal(whole[row, place], expected)
    assert int((whole == 7).all(2).sum()) == 2 * (6 - 3)


def test_hidden_pixels_reach_no_tap_and_no_answer() -> None:
    model, shown = mae(), masked()
    hidden = torch.zeros(3, 16, 1).scatter(1, shown["hide"][:, :, None], 1.0).expand(-1, -1, 32)
    other = X + 10 * unpatchify(hidden.contiguous(), 2)
    assert not torch.equal(other, X)
    before, after = seen(model, shown), seen(model, {**shown, "x": other})
    assert all(torch.equal(before[tap], after[tap]) for tap in before)
    assert torch.equal(model(**shown), model(**{**shown, "x": other}))
    assert not torch.equal(model(other), model(X)), "without a mask they are all seen"


def test_a_visible_token_is_that_of_its_patch_at_its_place() -> None:
    model, shown = mae(), masked()
    first: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    model(**shown), model(X)
    some, whole = first
    assert some.shape == (3, 1 + 4, 12) and whole.shape == (3, 1 + 16, 12)
    assert torch.equal(some[:, 0], whole[:, 0])
    for row, ids in enumerate(shown["keep"].tolist()):
        torch.testing.assert_close(some[row, 1:], whole[row, 1:][ids])
    patch = patchify(X, 4) @ model.encoder.embed.weight.T + model.encoder.embed.bias
    torch.testing.assert_close(whole[:, 1:], patch + positions((4, 4), 12))


def test_an_answer_is_of_the_patch_at_its_own_place() -> None:
    """Seen in a model whose tokens do not look at each other."""
    model, shown = mae(), masked()
    with torch.no_grad():
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.attention.project.weight.zero_(), block.mlp[2].weight.zero_()
    for place in shown["keep"][0].tolist():
        lit = torch.zeros(3, 16, 32).index_fill(1, torch.tensor(place), 1.0)
        changed = (model(**{**shown, "x": X + unpatchify(lit, 2)}) - model(**shown))[0].abs().sum(1)
        assert changed.nonzero().flatten().tolist() == [place]


def test_the_order_of_the_kept_patches_does_not_matter() -> None:
    model, shown = mae(), masked()
    other = {**shown, "keep": shown["keep"].flip(1)}
    torch.testing.assert_close(model(**shown), model(**other), atol=1e-5, rtol=0)
    here, there = (seen(model, x, "stage3")["stage3"] for x in (shown, other))
    torch.testing.assert_close(here[:, 1:], there[:, 1:].flip(1), atol=1e-5, rtol=0)


def test_all_patches_kept_is_no_mask() -> None:
    every = torch.arange(16).expand(3, 16)
    torch.testing.assert_close(mae()(X, every), mae()(X), atol=1e-5, rtol=0)


def test_the_encoders_work_grows_with_the_visible_tokens() -> None:
    """In proportion, but for what the tokens look at: their square, a small part at the paper's widths."""
    model, work = mae(width=16, depth=2), {}
    for keep in (masked(ratio=0.75)["keep"], masked(ratio=0.5)["keep"], None):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model.encoder(X, keep)
        n = 16 if keep is None else keep.shape[1]
        work[n] = counted.get_total_flops()
        patches, looking = n * 32 * 16, 2 * (n + 1) ** 2 * 16
        assert work[n] == 2 * 3 * (patches + 2 * ((n + 1) * 12 * 16**2 + looking))
    assert work[4] < 0.3 * work[16] and work[8] < 0.55 * work[16]


# --- taps ---


@pytest.mark.parametrize(
    ("depth", "ends"), [(4, [1, 2, 3, 4]), (6, [2, 3, 5, 6]), (8, [2, 4, 6, 8]), (12, [3, 6, 9, 12])]
)
def test_a_stage_is_a_quarter_of_the_blocks(depth: int, ends: list[int]) -> None:
    """So `stage3` is the 9th block of 12, and the 18th of 24, as in DMAE."""
    model = mae(depth=depth)
    at = seen(model, masked())
    assert all(at[tap].shape == (3, 5, 12) for tap in at)
    for stage, block in enumerate(ends, 1):
        assert torch.equal(at[f"stage{stage}"], at[f"block{block}"])
    with torch.device("meta"):
        assert MODELS["mae_large"](10).TAPS["stage3"] == "encoder.blocks.17"


def test_the_last_tap_has_not_gone_through_the_norm() -> None:
    model = mae()
    last = seen(model, X)["stage4"]
    given: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(X)
    assert torch.equal(given[0], last)
    assert not torch.allclose(last.mean(2), torch.zeros(()), atol=1e-3)


# --- it learns ---


def test_it_learns_to_say_what_is_hidden_and_all_of_it_learns() -> None:
    model, shown = mae().train(), masked(X.cumsum(3) / 4)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        said = model(**shown).gather(1, shown["hide"][:, :, None].expand(-1, -1, 32))
        there = patchify(shown["x"], 4).gather(1, shown["hide"][:, :, None].expand(-1, -1, 32))
        loss = (said - there).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_it_answers_alike_after_its_weights_went_elsewhere() -> None:
    model, other = mae().eval(), mae(1).eval()
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(X), model(X))


def test_it_compiles_whole() -> None:
    torch.compiler.reset()
    model, shown = mae(depth=1), masked()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**shown), model(**shown))


# --- what its encoder becomes ---


@pytest.mark.parametrize("change", [encoder, probe])
def test_a_classifier_is_the_encoder_with_a_new_head(change: object) -> None:
    model = mae()
    weights = copy.deepcopy(model.encoder.state_dict())
    made = change(copy.deepcopy(model))  # type: ignore[operator]
    assert made(X).shape == (3, 5) and isinstance(made, Classifier)
    assert all(torch.equal(v, made.encoder.state_dict()[name]) for name, v in weights.items())
    assert {name.partition(".")[0] for name, _ in made.named_parameters()} <= {"encoder", "norm", "head"}
    assert not any("decoder" in name or "pixels" in name for name in made.state_dict())
    at = seen(made.eval(), X)
    tokens = made.encoder(X)
    assert torch.equal(at["stage4"], tokens) and torch.equal(made.head(at["pooled"]), made(X))
    torch.testing.assert_close(at["pooled"], made.norm(tokens[:, 1:].mean(1)))


def test_fine_tuning_learns_all_of_it_but_the_probe_its_head_alone() -> None:
    for change, learns in ((encoder, {"encoder", "norm", "head"}), (probe, {"head"})):
        made = change(mae())
        to_work(made)
        made(X).square().sum().backward()
        found = {name.partition(".")[0] for name, p in made.named_parameters() if p.grad is not None}
        assert found == learns
        assert made.encoder.training == (change is encoder)


def test_the_probes_features_are_standardised_by_their_batch() -> None:
    made = probe(mae()).train()
    at = seen(made, X)["pooled"]
    torch.testing.assert_close(at.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(at.var(0, correction=0), torch.ones(12), atol=1e-2, rtol=0)


# --- what does not fit ---


@pytest.mark.parametrize("change", [encoder, probe])
def test_a_head_for_another_network_is_refused(change: object) -> None:
    with pytest.raises(Refused, match="goes on from an autoencoder, and found a CNN; name one"):
        change(CNN(5))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"patch": 5}, "size 16 and patches of 5"),
        ({"patch": 0}, "patches of 0"),
        ({"heads": 5}, "width 12, heads 5"),
        ({"depth": 0}, "depth 0"),
        ({"decoder_heads": 3}, "width 8, heads 3"),
        ({"width": 14, "heads": 2}, "width 14; expected a multiple of 4"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(knobs: dict[str, int], said: str) -> None:
    with pytest.raises(Refused, match=said):
        mae(**knobs)


@pytest.mark.parametrize("shape", [(12, 16), (16, 20), (32, 32)])
def test_images_of_another_size_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(Refused, match=rf"16x16 was shown {shape[0]}x{shape[1]}"):
        mae()(torch.randn(2, 2, *shape))


@pytest.mark.parametrize(("patch", "n"), [(2, 64), (8, 4)])
def test_a_mask_of_other_patches_is_refused(patch: int, n: int) -> None:
    with pytest.raises(Refused, match=f"of 16 patches was shown .* some of {n}; give the view `mask`"):
        mae()(**masked(ratio=0.5, patch=patch))
