"""An answer becomes bytes of fixed size and an answer again; what is lost is what the kind says."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from limbeck.core.refused import Refused
from limbeck.data.records import FLOOR, Field, encode, record, spread

Z = 3 * torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def back(field: Field, v: torch.Tensor) -> torch.Tensor:
    return field.decode(encode([field], {"out": v}) if field.name == "out" else _alone(field, v))


def _alone(field: Field, v: torch.Tensor) -> np.ndarray:
    return encode([Field("out", "float32", ()), field], {"out": v.flatten(1).sum(1), field.name: v})


def slow_q(z: list[float], top: int) -> list[float]:
    """The spec's target for one row, from half-precision values."""
    total = sum(map(math.exp, z))
    p = [math.exp(v) / total for v in z]
    kept = sorted(range(len(z)), key=lambda c: -p[c])[:top]
    values = [float(np.float16(p[c])) for c in kept]
    others = len(z) - top
    rest = min(max((1 - sum(values)) / others, 0.0), values[-1]) if others else 0.0
    norm = sum(values) + others * rest
    return [(values[kept.index(c)] if c in kept else rest) / norm for c in range(len(z))]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_whole_answer_is_its_rounding(kind: str) -> None:
    dtype = getattr(torch, kind)
    assert torch.equal(back(Field("out", kind, (20,)), Z), Z.to(dtype).float())
    assert torch.equal(back(Field("stage1", kind, (3, 4, 4)), MAPS), MAPS.to(dtype).float())


def test_int8_is_within_half_a_step_of_each_records_own_scale() -> None:
    v = MAPS * torch.logspace(-3, 3, 7).view(-1, 1, 1, 1)
    v[3] = 0
    step = v.flatten(1).abs().amax(1) / 127
    gap = (back(Field("stage1", "int8", (3, 4, 4)), v) - v).flatten(1).abs().amax(1)
    assert bool((gap <= 0.501 * step).all()) and gap[3] == 0 and bool((gap[:3] > 0).all())


@pytest.mark.parametrize("top", [1, 3, 10, 20])
def test_the_top_probabilities_are_the_specs_target(top: int) -> None:
    q = back(Field("out", "top", (20,), top), Z).softmax(1)
    expected = torch.tensor([slow_q(row, top) for row in Z.double().tolist()])
    torch.testing.assert_close(q, expected.float(), atol=2e-6, rtol=1e-3)
    torch.testing.assert_close(q.sum(1), torch.ones(7), atol=1e-6, rtol=0)
    assert torch.equal(q.argmax(1), Z.argmax(1))
    rest = q.sort(1, descending=True).values[:, top:]
    if top < 20:
        assert bool((rest.amax(1) - rest.amin(1) < 1e-7).all())


def test_the_more_is_kept_the_nearer_it_is() -> None:
    p = Z.softmax(1)
    gaps = [(back(Field("out", "top", (20,), k), Z).softmax(1) - p).abs().sum(1) / 2 for k in (1, 3, 10, 20)]
    for less, more in pairwise(gaps):
        assert bool((more <= less + 1e-3).all())
    for k, gap in zip((1, 3, 10, 20), gaps, strict=True):
        left = 1 - p.topk(k).values.sum(1)
        assert bool((gap <= left + 1e-3).all())


def test_a_certain_teacher_has_finite_logarithms_and_more_than_all_is_made_all() -> None:
    certain = torch.zeros(2, 20)
    certain[0, 4], certain[1, 3] = 100, 40
    z = back(Field("out", "top", (20,), 3), certain)
    assert bool(torch.isfinite(z).all()) and z.argmax(1).tolist() == [4, 3]
    even = spread(np.array([[0.5, 0.1]], np.float16), 5)  # 0.4 / 3 would be more than what was kept
    np.testing.assert_allclose(np.exp(even), np.array([[5, 1, 1]]) / 9, rtol=1e-3)
    *logs, rest = spread(np.array([[0.75, 0.2505, 0.001]]), 20)[0]  # sums to more than 1
    assert abs(np.exp(logs).sum() + 17 * np.exp(rest) - 1) < 1e-6
    assert abs(rest - math.log(FLOOR)) < 0.01


def test_top_logits_keep_the_logits_and_the_mass_of_the_rest() -> None:
    z = back(Field("out", "top-logits", (20,), 5), Z)
    kept = Z.topk(5)
    torch.testing.assert_close(z.gather(1, kept.indices), kept.values, atol=0.01, rtol=0)
    torch.testing.assert_close(z.logsumexp(1), Z.logsumexp(1), atol=0.01, rtol=0)
    torch.testing.assert_close(back(Field("out", "top-logits", (20,), 20), Z), Z, atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", ["float16", "top", "top-logits"])
def test_a_dense_answer_is_that_of_each_place(kind: str) -> None:
    z = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(2))
    top = 0 if kind == "float16" else 2
    dense = back(Field("out", kind, (6, 3, 4), top), z)
    alone = back(Field("out", kind, (6,), top), z.permute(0, 2, 3, 1).reshape(-1, 6))
    assert torch.equal(dense, alone.view(2, 3, 4, 6).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("classes", "size"), [(256, 30), (257, 40), (65_536, 40), (65_537, 60)])
def test_the_width_of_an_index_follows_the_classes(classes: int, size: int) -> None:
    field = Field("out", "top", (classes,), 10)
    assert record([field]).itemsize == size
    z = torch.zeros(1, classes)
    z[0, -1] = 9.0
    assert int(back(field, z).argmax()) == classes - 1


@pytest.mark.parametrize(
    ("name", "kind", "top", "said"),
    [
        ("out", "top", 21, "top 21 of 'out' were asked for, and it has 20 classes"),
        ("out", "top", 0, "top 0"),
        ("out", "int8", 0, "'out' cannot be kept as 'int8'"),
        ("stage1", "top", 3, "'stage1' cannot be kept as 'top'"),
    ],
)
def test_what_cannot_be_kept_is_refused(name: str, kind: str, top: int, said: str) -> None:
    with pytest.raises(Refused, match=said):
        Field(name, kind, (20,), top)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("float16", 1e5), ("float32", math.nan), ("top", math.nan), ("top", math.inf), ("top-logits", 1e5)],
)
def test_what_does_not_fit_is_refused(kind: str, value: float) -> None:
    z = Z.clone()
    z[2, 3] = value
    with pytest.raises(Refused, match="NaN, infinite or too large"):
        back(Field("out", kind, (20,), 3 if "top" in kind else 0), z)


def test_another_shape_than_the_first_batchs_is_refused() -> None:
    with pytest.raises(Refused, match=r"has shape \(20,\), expected \(19,\)"):
        back(Field("out", "float32", (19,)), Z)
