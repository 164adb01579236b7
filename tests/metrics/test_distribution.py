"""Fréchet distance, KID, PRDC, Vendi, CMMD and Inception Score against other people's programs and by hand.

torch-fidelity and clean-fid need torchvision, which this project keeps out, and where torch-fidelity is installed
without it torchmetrics no longer imports. So their numbers stand here as they were printed, and the tests named
``_live`` compare again where somebody has put them on the path: ``pip install --no-deps --target DIR
torch-fidelity==0.4.0 clean-fid==0.1.35``, then ``PYTHONPATH=DIR``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import sys
import tracemalloc
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.metrics import distribution
from dataflow.metrics.distribution import Moments

SEED = 20261122
TORCH_FIDELITY_FID = 7.014979384640071
TORCH_FIDELITY_KID = {
    500: (0.05500413705887817, 0.004976558885811013),
    1000: (0.05480693514398737, 0.0011413752417123789),
}
TORCH_FIDELITY_IS = (8.602489703368036, 0.46503602606452993)
TORCH_FIDELITY_PRECISION_RECALL = {3: (0.377, 0.66333335), 5: (0.498, 0.77)}
CLEAN_FID = 7.014979384639986


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    """1,200 real and 1,000 generated rows of 64 numbers."""
    draw = np.random.default_rng(SEED)
    mix = draw.normal(size=(64, 64)) / 8
    real = draw.normal(size=(1200, 64))
    return real, draw.normal(size=(1000, 64)) @ (np.eye(64) + 0.35 * mix) + 0.12


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    draw = np.random.default_rng(SEED + 1)
    return draw.normal(size=(1000, 50)) * 3


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty modules in torchvision's place; they and what was imported over them are gone again after the test."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not on the path (see the top of this file)")
    before = set(sys.modules)
    names = ["torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"]
    for name in names:
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        module.__dict__.update(dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), object))
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "torch_fidelity":
            del sys.modules[name]


def covariance(rows: np.ndarray) -> np.ndarray:
    return np.cov(rows, rowvar=False)


def frechet(real: np.ndarray, made: np.ndarray) -> float:
    return distribution.fid(Moments.of(real), Moments.of(made))


# Fréchet distance


def test_fid_equals_torch_fidelity_and_clean_fid(sets) -> None:
    assert frechet(*sets) == pytest.approx(TORCH_FIDELITY_FID, rel=1e-12)
    assert frechet(*sets) == pytest.approx(CLEAN_FID, rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_equals_torch_fidelity_live(sets, without_torchvision) -> None:
    import torch

    metric = importlib.import_module("torch_fidelity.metric_fid")
    stats = [metric.fid_features_to_statistics(torch.from_numpy(rows)) for rows in sets]
    theirs = metric.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert theirs == pytest.approx(TORCH_FIDELITY_FID, rel=1e-13)
    assert frechet(*sets) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_equals_clean_fid_live(sets) -> None:
    spec = importlib.util.find_spec("cleanfid")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("clean-fid is not on the path (see the top of this file)")
    from scipy import linalg

    source = (Path(next(iter(spec.submodule_search_locations))) / "fid.py").read_text()
    wanted = [node for node in ast.parse(source).body if getattr(node, "name", "") == "frechet_distance"]
    scope: dict[str, Any] = {"np": np, "linalg": linalg}
    exec(compile(ast.Module(wanted, []), "clean-fid", "exec"), scope)
    real, made = sets
    theirs = scope["frechet_distance"](real.mean(0), covariance(real), made.mean(0), covariance(made))
    assert theirs == pytest.approx(CLEAN_FID, rel=1e-12)
    assert frechet(real, made) == pytest.approx(theirs, rel=1e-12)


def test_fid_equals_scipys_root(sets) -> None:
    from scipy import linalg

    real, made = sets
    step = real.mean(0) - made.mean(0)
    root = linalg.sqrtm(covariance(real) @ covariance(made))
    expected = step @ step + np.trace(covariance(real) + covariance(made) - 2 * np.real(root))
    assert frechet(real, made) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fid_equals_torchmetrics(sets) -> None:
    import torch

    image = pytest.importorskip("torchmetrics.image.fid", exc_type=ImportError)

    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, rows):
            return rows

    metric = image.FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    for rows, real in ((sets[0], True), (sets[1], False)):
        metric.update(torch.from_numpy(rows), real=real)
    assert frechet(*sets) == pytest.approx(float(metric.compute()), rel=1e-12)


def test_frechet_distance_of_diagonal_gaussians_is_a_formula() -> None:
    first, second = np.array([4.0, 9.0, 0.0]), np.array([1.0, 16.0, 2.0])
    expected = 3.0 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    found = distribution.frechet_distance(np.zeros(3), np.diag(first), np.ones(3), np.diag(second))
    assert found == pytest.approx(expected, rel=1e-14)


def test_frechet_distance_with_fewer_rows_than_dimensions() -> None:
    draw = np.random.default_rng(SEED)
    one, other = draw.normal(size=(20, 100)), draw.normal(size=(30, 100)) + 1
    # The trace of the root is the nuclear norm of the product of the centred rows.
    left, right = (rows - rows.mean(0) for rows in (one, other))
    root = np.linalg.svd(left @ right.T, compute_uv=False).sum() / math.sqrt(19 * 29)
    step = one.mean(0) - other.mean(0)
    expected = step @ step + np.trace(covariance(one)) + np.trace(covariance(other)) - 2 * root
    # The roots of what should be zero eigenvalues are all of 1e-8, and there are eighty.
    assert frechet(one, other) == pytest.approx(expected, rel=1e-7)
    assert frechet(one, one) == pytest.approx(0, abs=1e-5)


def test_float32_statistics_are_taken(sets) -> None:
    real, made = (rows.astype(np.float32) for rows in sets)
    found = distribution.frechet_distance(
        real.mean(0), covariance(real).astype(np.float32), made.mean(0), covariance(made).astype(np.float32)
    )
    assert found == pytest.approx(TORCH_FIDELITY_FID, rel=1e-4)


def test_identical_and_constant_rows() -> None:
    rows = np.full((5, 3), 0.1)
    assert frechet(rows, rows) == 0
    assert frechet(rows, rows + 1) == pytest.approx(3)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_is_symmetric_and_does_not_turn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = draw.normal(size=(40, 6)) * draw.uniform(0.01, 30, 6), draw.normal(size=(50, 6))
    turned, _ = np.linalg.qr(draw.normal(size=(6, 6)))
    found = frechet(one, other)
    assert found > 0
    assert found == pytest.approx(frechet(other, one), rel=1e-8)
    assert found == pytest.approx(frechet(one @ turned + 3, other @ turned + 3), rel=1e-8)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: frechet(np.zeros((1, 3)), np.zeros((5, 3))), "at least 2 rows, not 1"),
        (lambda: frechet(np.zeros((5, 3)), np.zeros((5, 4))), "dimensions 3 and 4 differ"),
        (lambda: frechet(np.array([[0.0, np.nan], [1, 1]]), np.zeros((5, 2))), "NaN or infinity in row 0"),
        (lambda: distribution.frechet_distance([0], [[np.inf]], [0], [[1]]), "NaN or infinity in the mean"),
        (lambda: distribution.frechet_distance([0, 0], [[1, 2], [3, 1]], [0, 0], np.eye(2)), "not symmetric"),
        (lambda: distribution.frechet_distance([0, 0], [[1, 0], [0, -1]], [0, 0], np.eye(2)), "not a covariance"),
        (lambda: distribution.frechet_distance([0, 0], np.eye(3), [0, 0], np.eye(2)), "expected shapes"),
    ],
)
def test_frechet_distance_refuses(bad, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bad()


# Moments


@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from([0.0, 1e3, 1e6])
)
@settings(max_examples=40, deadline=None)
def test_moments_do_not_depend_on_the_cuts(seed: int, sizes: list[int], offset: float) -> None:
    draw = np.random.default_rng(seed)
    parts = [draw.normal(size=(size, 4)) + offset for size in [*sizes, 3]]
    rows = np.concatenate(parts)
    chunked, merged = Moments(4), Moments(4)
    for part in parts:
        chunked.update(part)
        merged.merge(Moments(4).update(part))
    for moments in (chunked, merged, Moments.of(rows, chunk=7)):
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.covariance, covariance(rows), rtol=1e-8, atol=1e-12 * (1 + offset))


def test_moments_survive_merging_with_themselves_and_a_bad_chunk() -> None:
    rows = np.random.default_rng(SEED).normal(size=(10, 3))
    moments = Moments.of(rows)
    with pytest.raises(ValueError, match="NaN or infinity in row 1"):
        moments.update([[0, 0, 0], [0, np.inf, 0]])
    with pytest.raises(ValueError, match=r"expected shape \(n, 3\)"):
        moments.update(np.zeros((2, 4)))
    np.testing.assert_allclose(moments.covariance, covariance(rows), rtol=1e-12)
    moments.merge(moments)
    np.testing.assert_allclose(moments.covariance, covariance(np.tile(rows, (2, 1))), rtol=1e-12)


def test_moments_from_statistics_go_on_counting() -> None:
    rows = np.random.default_rng(SEED).normal(size=(30, 5))
    published = Moments.from_statistics(rows[:20].mean(0), covariance(rows[:20]), 20)
    np.testing.assert_allclose(published.update(rows[20:]).covariance, covariance(rows), rtol=1e-12)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: Moments(0), "at least 1"),
        (lambda: Moments(2).mean, "no rows"),
        (lambda: Moments(2).update([[1, 2]]).covariance, "at least 2 rows, not 1"),
        (lambda: Moments(2).merge(Moments(3)), "cannot be merged"),
        (lambda: Moments.of(np.zeros(3)), "expected shape"),
        (lambda: Moments.from_statistics([0], [[1]], 1), "at least 2 rows, not 1"),
    ],
)
def test_moments_refuse(bad, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bad()


# KID


@pytest.mark.parametrize("size", [500, 1000])
def test_kid_equals_torch_fidelity(sets, size: int) -> None:
    real, made = sets
    found = distribution.kid(real, made, subset_size=size)
    assert found == pytest.approx(TORCH_FIDELITY_KID[size], rel=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kid_equals_torch_fidelity_live(sets, without_torchvision) -> None:
    import torch

    real, made = sets
    metric = importlib.import_module("torch_fidelity.metric_kid")
    theirs = metric.kid_features_to_metric(
        torch.from_numpy(made), torch.from_numpy(real), kid_subset_size=500, verbose=False
    )
    expected = (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"])
    assert expected == pytest.approx(TORCH_FIDELITY_KID[500], rel=1e-12)
    assert distribution.kid(real, made, subset_size=500) == pytest.approx(expected, rel=1e-12)


def test_kid_of_one_subset_by_its_definition() -> None:
    draw = np.random.default_rng(SEED)
    one, other = draw.normal(size=(6, 3)), draw.normal(size=(6, 3)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / 3 + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (one, other)]
    between = np.mean([kernel(a, b) for a in one for b in other])
    found = distribution.kid(one, other, subsets=3, subset_size=6)
    assert found.mean == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kid_is_not_biased_by_the_count() -> None:
    draw = np.random.default_rng(SEED)
    rows = draw.normal(size=(2000, 8))
    small = distribution.kid(rows[:1000], rows[1000:], subset_size=20, subsets=400)
    large = distribution.kid(rows[:1000], rows[1000:], subset_size=400, subsets=20)
    assert abs(small.mean) < 4 * small.std / 20
    assert abs(large.mean) < 0.02


def test_kid_refuses(sets) -> None:
    real, made = sets
    with pytest.raises(ValueError, match="generated: 10 rows are too few for subsets of 1000"):
        distribution.kid(real, made[:10])
    with pytest.raises(ValueError, match="at least 2 rows"):
        distribution.kid(real, made, subset_size=1)
    with pytest.raises(ValueError, match="cannot be compared"):
        distribution.kid(real, made[:, :3])
    with pytest.raises(ValueError, match="real: expected shape"):
        distribution.kid(real[0], made)


# Precision, recall, density, coverage


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("chunk", [64, 1024, 5000])
def test_prdc_equals_torch_fidelity(sets, k: int, chunk: int) -> None:
    found = distribution.prdc(*sets, k=k, chunk=chunk)
    assert found[:2] == pytest.approx(TORCH_FIDELITY_PRECISION_RECALL[k], abs=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_precision_and_recall_equal_torch_fidelity_live(sets, without_torchvision) -> None:
    import torch

    real, made = (torch.from_numpy(rows) for rows in sets)
    metric = importlib.import_module("torch_fidelity.metric_prc")
    for k in (3, 5):
        theirs = metric.prc_features_to_metric(made, real, prc_neighborhood=k, verbose=False)
        found = distribution.prdc(*sets, k=k)
        assert found[:2] == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


@pytest.mark.parametrize("k", [3, 5])
def test_prdc_equals_prdc(sets, k: int) -> None:
    theirs = pytest.importorskip("prdc").compute_prdc(*sets, nearest_k=k)
    found = distribution.prdc(*sets, k=k)
    assert found._asdict() == pytest.approx({name: float(theirs[name]) for name in found._fields}, rel=1e-12)


def test_prdc_by_hand() -> None:
    real, made = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [2.9], [10.0]])
    # k = 1: real radii 1, 1, 2; generated radii 2.4, 2.4, 7.1.
    found = distribution.prdc(real, made, k=1)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 1
    assert found.density == pytest.approx((2 + 1) / 3)
    assert found.coverage == 1


def test_prdc_of_equal_and_of_far_sets() -> None:
    rows = np.random.default_rng(SEED).normal(size=(50, 4))
    assert distribution.prdc(rows, rows).precision == distribution.prdc(rows, rows).coverage == 1
    assert distribution.prdc(rows, rows + 1000) == (0, 0, 0, 0)


def test_prdc_takes_copies_of_a_row_as_neighbours_at_no_distance() -> None:
    rows = np.repeat(np.random.default_rng(SEED).normal(size=(10, 512)) + 100, 4, axis=0)
    # Balls of radius 0 hold nothing, not even their own centre.
    assert distribution.prdc(rows, rows, k=3) == (0, 0, 0, 0)
    assert distribution.prdc(rows, rows, k=4).precision == 1


def test_prdc_never_holds_all_distances() -> None:
    rows = np.random.default_rng(SEED).normal(size=(4000, 4))
    tracemalloc.start()
    distribution.prdc(rows, rows + 0.1, k=2, chunk=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 < 4000 * 4000 * 8


def test_prdc_refuses(sets) -> None:
    real, made = sets
    with pytest.raises(ValueError, match="real: 5 rows are too few, at least 6"):
        distribution.prdc(real[:5], made)
    with pytest.raises(ValueError, match="at least 1"):
        distribution.prdc(real, made, k=0)


# Vendi score


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("count", [40, 1000])
def test_vendi_equals_vendi_score(sets, count: int) -> None:
    theirs = pytest.importorskip("vendi_score.vendi")
    rows = sets[1][:count]
    found = distribution.vendi_score(rows)
    assert found == pytest.approx(theirs.score_X(rows), rel=1e-10)
    assert found == pytest.approx(theirs.score_dual(rows), rel=1e-10)


def test_vendi_counts_directions() -> None:
    assert distribution.vendi_score(np.eye(7)) == pytest.approx(7)
    assert distribution.vendi_score(np.ones((9, 3))) == pytest.approx(1)
    assert distribution.vendi_score(np.repeat(np.eye(4), 5, axis=0) * 3) == pytest.approx(4)
    assert distribution.vendi_score([[1.0, 2.0]]) == pytest.approx(1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_vendi_stays_in_its_range(seed: int, count: int, dimension: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(count, dimension))
    found = distribution.vendi_score(rows)
    assert 1 <= found <= min(count, dimension) + 1e-9
    assert distribution.vendi_score(np.concatenate([rows, rows])) == pytest.approx(found, rel=1e-9)


def test_vendi_refuses() -> None:
    with pytest.raises(ValueError, match="no direction in row 1"):
        distribution.vendi_score([[1, 0], [0, 0]])
    with pytest.raises(ValueError, match="no rows"):
        distribution.vendi_score(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="expected shape"):
        distribution.vendi_score([1.0, 2.0])


# CMMD


@pytest.mark.parametrize("chunk", [100, 4096])
def test_cmmd_equals_its_formula(sets, chunk: int) -> None:
    real, made = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in sets)

    def mean_kernel(one: np.ndarray, other: np.ndarray) -> float:
        squares = ((one[:, None, :] - other[None, :, :]) ** 2).sum(-1)
        return float(np.exp(-squares / 200).mean())

    some, few = real[:300], made[:200]
    expected = 1000 * (mean_kernel(some, some) + mean_kernel(few, few) - 2 * mean_kernel(some, few))
    assert distribution.cmmd(sets[0][:300], sets[1][:200], chunk=chunk) == pytest.approx(expected, rel=1e-8)


def test_cmmd_by_hand_and_of_equal_sets(sets) -> None:
    # Two opposite unit vectors are 2 apart.
    assert distribution.cmmd([[3.0, 0.0]], [[-1.0, 0.0]]) == pytest.approx(2000 * -math.expm1(-4 / 200), rel=1e-12)
    assert distribution.cmmd(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)
    assert distribution.cmmd(*sets) == pytest.approx(distribution.cmmd(sets[1], 7 * sets[0]), rel=1e-9)


def test_cmmd_refuses() -> None:
    with pytest.raises(ValueError, match="real: no direction in row 0"):
        distribution.cmmd([[0.0, 0.0]], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="above 0"):
        distribution.cmmd([[1.0]], [[1.0]], sigma=0)
    with pytest.raises(ValueError, match="too few"):
        distribution.cmmd(np.zeros((0, 2)), [[1.0, 0.0]])


# Inception Score


def test_inception_score_equals_torch_fidelity(logits) -> None:
    assert distribution.inception_score(logits) == pytest.approx(TORCH_FIDELITY_IS, rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inception_score_equals_torch_fidelity_live(logits, without_torchvision) -> None:
    import torch

    metric = importlib.import_module("torch_fidelity.metric_isc")
    theirs = metric.isc_features_to_metric(torch.from_numpy(logits))
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    assert expected == pytest.approx(TORCH_FIDELITY_IS, rel=1e-12)
    assert distribution.inception_score(logits) == pytest.approx(expected, rel=1e-12)


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert distribution.inception_score(np.zeros((20, 5)), splits=2) == pytest.approx((1, 0))
    sure = np.tile(np.eye(5) * 2000, (4, 1))
    assert distribution.inception_score(sure, splits=1).mean == pytest.approx(5)
    # Five rows per split in order hold each class once.
    assert distribution.inception_score(sure, splits=4, shuffle=False) == pytest.approx((5, 0))
    assert distribution.inception_score(sure, splits=20).mean == pytest.approx(1)


def test_inception_score_refuses() -> None:
    with pytest.raises(ValueError, match="logits: 3 rows are too few, at least 10"):
        distribution.inception_score(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="at least 1"):
        distribution.inception_score(np.zeros((3, 5)), splits=0)
