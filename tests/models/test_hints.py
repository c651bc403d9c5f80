"""Hints by clustering: the synthetic check that decides, what clusters may be, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.teachers import Frozen
from limbeck.models.choose import blocks
from limbeck.models.hints import Hints, cluster, hints, paired, unasked
from limbeck.pieces.distances import distances
from limbeck.pieces.representation import METRICS, similarities


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(noise: float, seed: int) -> list[Tensor]:
    """Twelve layers, linear images of three blocks of latents: 1 to 5, 6 to 8, 9 to 12."""
    latents = [normal(2000, 12, seed=1000 * seed + n) for n in range(3)]
    members = [0] * 5 + [1] * 3 + [2] * 4
    return [
        latents[own] @ normal(12, 16, seed=1000 * seed + 10 + n)
        + noise * normal(2000, 16, seed=1000 * seed + 50 + n)
        for n, own in enumerate(members)
    ]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_three_groups_are_found_and_their_middles_are_hints(noise: float, seed: int) -> None:
    assignment, centres, rounds = cluster(1 - similarities(groups(noise, seed)), 3)
    assert assignment == (0,) * 5 + (1,) * 3 + (2,) * 4
    assert [centre + 1 for centre in centres] == [3, 7, 10] and rounds == 1


# --- clusters ---


def places(*numbers: float) -> Tensor:
    """Distances of points on a line."""
    return distances(torch.tensor(numbers, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("update", ["paper", "medoid"])
def test_every_layer_is_in_one_cluster_and_a_centre_in_its_own(update: str) -> None:
    for seed in range(20):
        layers = 3 + seed % 7
        distance = distances(normal(layers, 2, seed=seed))
        for count in range(1, layers + 1):
            found = cluster(distance, count, update)
            assignment, centres, _ = found
            assert len(assignment) == layers and set(assignment) == set(range(count))
            assert [assignment[centre] for centre in centres] == list(range(count))
            assert list(centres) == sorted(centres)
            assert cluster(distance.clone(), count, update) == found


def test_as_many_clusters_as_layers_are_the_layers() -> None:
    assert cluster(distances(normal(6, 2, seed=0)), 6) == (tuple(range(6)), tuple(range(6)), 0)


def test_one_cluster_is_hinted_at_by_its_middle() -> None:
    assert cluster(places(*range(5)), 1)[:2] == ((0,) * 5, (2,))
    assert cluster(places(0, 0.1, 0.2, 9), 1)[1] == (1,)
    assert cluster(places(9, 0, 0.2, 0.1), 1, "medoid")[1] == (3,)


@pytest.mark.parametrize("update", ["paper", "medoid"])
def test_two_groups_far_apart_are_found(update: str) -> None:
    distance = places(0, 0.1, 0.2, 0.3, 0.4, 0.5, 9, 9.1)
    assert cluster(distance, 2, update)[0] == (0,) * 6 + (1,) * 2


def test_the_mean_place_is_rounded_down_and_a_medoid_is_nearest_to_all() -> None:
    assert cluster(places(0, 0.1, 0.2, 0.3, 9, 9.1), 2)[1] == (1, 4)
    distance = places(0, 1.9, 2.0, 2.1, 9, 9.1)  # the second of the first four is not their middle
    assert cluster(distance, 2)[1] == (1, 4) and cluster(distance, 2, "medoid")[1][0] in (1, 2)
    assert cluster(places(0, 0.1, 3, 0.2, 9, 9.1), 2, "medoid")[1][0] == 1


def test_of_members_apart_the_one_nearest_to_the_mean_place_is_the_centre() -> None:
    distance = places(0, 9, 9.1, 0.1, 0.2, 9.2)  # clusters (0, 3, 4) and (1, 2, 5)
    assignment, centres, _ = cluster(distance, 2)
    assert centres == (2, 3) and assignment == (1, 0, 0, 1, 1, 0)


def test_a_layer_shown_twice_leaves_the_others_alone() -> None:
    twice = cluster(places(0, 0.1, 0.2, 0.2, 9, 9.1, 9.2), 2)[0]
    assert twice == (0, 0, 0, 0, 1, 1, 1)
    alike = places(5, 5, 5, 5)  # all the same: centres stay in clusters of their own
    assert set(cluster(alike, 2)[0]) == {0, 1}


def test_what_cannot_be_clustered_is_refused() -> None:
    for count in (0, 6):
        with pytest.raises(Refused, match=f"{count} clusters of 5 layers were asked for, expected 1 to 5"):
            cluster(places(*range(5)), count)
    with pytest.raises(Refused, match=r"no update 'mean'; expected paper .* or medoid"):
        cluster(places(*range(5)), 2, "mean")


# --- a network ---


def network(name: str = "resnet14", **knobs: Any) -> nn.Module:
    torch.manual_seed(0)
    widths = {"widths": [4, 4, 5, 6]} if name.startswith("resnet") else {}
    model: nn.Module = registry.find("model", name)(classes=10, **widths, **knobs)
    return model


def images(count: int = 128, size: int = 8, label: int = 0, rows: int = 32) -> Iterator[Batch]:
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    for part in x.split(rows):
        yield Batch(part, torch.full((len(part),), label), torch.arange(len(part)))


def found(model: nn.Module | Frozen, metric: str = "r2_cca", **knobs: Any) -> Hints:
    return hints(model, images(), 3, metric, **knobs)


@pytest.mark.parametrize("metric", METRICS)
def test_a_networks_blocks_are_compared_by_what_they_show(metric: str) -> None:
    model = network()
    seen = found(model, metric)
    assert seen.layers == blocks(model, next(images()).x) and len(seen.layers) == 6
    shown: dict[str, list[Tensor]] = {layer: [] for layer in seen.layers}
    for layer, kept in shown.items():
        model.get_submodule(layer).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
    with torch.no_grad():
        model.eval()(torch.cat([batch.x for batch in images()]))
    features = [kept[0].mean((2, 3)) for kept in shown.values()]
    torch.testing.assert_close(seen.similarity, similarities(features, metric), rtol=1e-4, atol=1e-4)
    assert seen.chosen == tuple(seen.layers[centre] for centre in seen.centres)
    assert (seen.assignment, seen.centres) == cluster(1 - seen.similarity, 3)[:2]


def test_nothing_of_the_network_moves_and_labels_are_not_read() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = found(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    other = hints(model, images(label=7), 3)
    assert other.chosen == first.chosen and other.similarity.equal(first.similarity)


def test_a_teacher_is_asked_as_it_is_shown_things() -> None:
    def flipped(batch: Batch) -> Batch:
        return batch.replace(x=-batch.x)

    model = network()
    own = found(Frozen(model, view=flipped, normalise=(0.5, 2.0)))
    by_hand = hints(model, (b.replace(x=(-b.x - 0.5) / 2) for b in images()), 3)
    torch.testing.assert_close(own.similarity, by_hand.similarity, rtol=1e-4, atol=1e-4)
    assert not own.similarity.allclose(found(model).similarity, atol=1e-3)

    def coloured(batch: Batch) -> Batch:
        return batch.replace(x=batch.x.repeat(1, 3, 1, 1))

    grey = [batch.replace(x=batch.x[:, :1]) for batch in images()]
    in_colour = hints(model, [coloured(batch) for batch in grey], 3)
    assert hints(Frozen(model, view=coloured), grey, 3).similarity.equal(in_colour.similarity)


def test_tokens_are_averaged_too() -> None:
    model = network("vit_tiny", depth=3, width=12, patch=4, size=8).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # else its blocks change next to nothing
    seen = hints(model, images(160), 2)
    shown: list[Tensor] = []
    for layer in seen.layers:
        model.get_submodule(layer).register_forward_hook(lambda _, __, out: shown.append(out.mean(1)))
    with torch.no_grad():
        model(torch.cat([batch.x for batch in images(160)]))
    assert len(shown) == 3
    torch.testing.assert_close(seen.similarity, similarities(shown), rtol=1e-4, atol=1e-4)


def test_no_more_samples_are_looked_at_than_asked_for() -> None:
    def endless() -> Iterator[Batch]:
        while True:
            yield from images()

    few = hints(network(), endless(), 2, samples=100)
    all_of_them = hints(network(), images(100), 2)
    torch.testing.assert_close(few.similarity, all_of_them.similarity, rtol=1e-4, atol=1e-5)


def test_whether_clusters_are_runs_of_neighbours_is_told() -> None:
    class Shuffled(nn.Module):
        """Blocks that show one of two things in turn."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Identity() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            u, v = x[:, :2] * 1.0, x[:, 2:] * 1.0
            self.a(u), self.b(v), self.c(u * 1.5), self.d(v * 2.5)
            return x

    batches = [Batch(normal(100, 4, seed=1))]
    mixed = hints(Shuffled(), batches, 2, layers="abcd")
    assert mixed.assignment == (0, 1, 0, 1) and not mixed.contiguous
    assert hints(Shuffled(), batches, 2, layers="acbd").contiguous


def test_names_are_paired_in_order_and_the_head_keeps_its_own() -> None:
    model = network()
    pairs = paired(model, images(), ("stage1", "stage2", "stage3", "pooled"))
    assert list(pairs) == ["stage1", "stage2", "stage3"] and tuple(pairs.values()) == found(model).chosen


def test_before_it_has_learned_blocks_are_evenly_spaced() -> None:
    teacher, first = Frozen(network()), next(images())
    pairs = unasked(teacher, first, ("stage1", "stage2", "stage3"), 1000)
    assert pairs == {"stage1": "layer1.0", "stage2": "layer2.0", "stage3": "layer3.1"}
    with pytest.raises(Refused, match=r"6 channels .* by 59 samples"):
        unasked(teacher, first, ("stage1",), 59)


def test_what_tells_nothing_is_refused() -> None:
    with pytest.raises(Refused, match=r"up to 6 channels would be compared by 32 samples.*bring 60 or more"):
        hints(network(), images(32), 3)
    with pytest.raises(Refused, match="no batch to look"):
        hints(network(), [], 3)
    with pytest.raises(Refused, match="7 clusters of 6 layers"):
        hints(network(), images(), 7)
    with pytest.raises(Refused, match="looks at no block's output"):
        paired(network(), images(), ("pooled",))
    with pytest.raises(Refused, match="looks at 'stage1_pre', in front of an activation"):
        paired(network(), images(), ("stage1_pre", "stage2_pre"))
