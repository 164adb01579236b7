"""How far two sets of embeddings are apart, and how varied one set is.

Everything takes embeddings that were made elsewhere, one row each, in any float type, and computes in float64. Numbers
made with different extractors, resizing rules or counts of rows must not be compared: FID above all is biased by the
count (smaller sets look worse), so a report has to state it. NaN and infinity raise ValueError: no score is ever NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dataflow.metrics.alignment import unit_rows

FloatArray = npt.NDArray[np.float64]

_ASYMMETRY = 1e-6
"""Share of the largest entry by which a covariance may differ from its transpose: float32 statistics do."""

_NEGATIVE = 1e-3
"""Share of the largest possible eigenvalue that a negative one may reach before it is no rounding any more."""


class Estimate(NamedTuple):
    """Mean and standard deviation (divided by their number) over subsets or splits."""

    mean: float
    std: float


class PRDC(NamedTuple):
    """Precision, recall and coverage are in 0..1; density is 0 or more, about 1 where the sets are alike."""

    precision: float
    recall: float
    density: float
    coverage: float


class Moments:
    """Count, mean and covariance of rows that need never be in memory together.

    Memory is d² numbers, whatever the count. Parts may be made in any order, on any machine, and merged; how they were
    cut changes the result by rounding only.

    Args:
        dimension: numbers per row, d.

    Source: the pairwise update of Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.
    """

    def __init__(self, dimension: int) -> None:
        if dimension < 1:
            raise ValueError(f"dimension: expected at least 1, not {dimension}")
        self.count = 0
        self._mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    @classmethod
    def of(cls, features: npt.ArrayLike, chunk: int = 8192) -> Moments:
        """The moments of rows in memory, shape (n, d); ``chunk`` rows at a time become float64.

        Raises:
            ValueError: another shape, NaN or infinity.
        """
        rows = np.asarray(features)
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(f"features: expected shape (n, d), not {rows.shape}")
        moments = cls(rows.shape[1])
        for start in range(0, len(rows), chunk):
            moments.update(rows[start : start + chunk])
        return moments

    @classmethod
    def from_statistics(cls, mean: npt.ArrayLike, covariance: npt.ArrayLike, count: int) -> Moments:
        """Moments from published statistics, such as the ``mu`` and ``sigma`` of a reference set.

        Args:
            mean: shape (d,).
            covariance: shape (d, d), divided by ``count - 1`` as numpy's ``cov`` does.
            count: rows they were made of.

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, a covariance that is not symmetric, or a count below 2.
        """
        centre, spread = _statistics(mean, covariance, "statistics")
        if count < 2:
            raise ValueError(f"count: a covariance takes at least 2 rows, not {count}")
        moments = cls(len(centre))
        moments.count, moments._mean, moments._scatter = int(count), centre.copy(), spread * (count - 1)
        return moments

    @property
    def mean(self) -> FloatArray:
        """Shape (d,), float64.

        Raises:
            ValueError: no rows yet.
        """
        if not self.count:
            raise ValueError("the mean of no rows is not defined")
        return self._mean.copy()

    @property
    def covariance(self) -> FloatArray:
        """Shape (d, d), float64, divided by ``count - 1``.

        Raises:
            ValueError: fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance takes at least 2 rows, not {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: npt.ArrayLike) -> Moments:
        """Take in more rows, shape (n, d), n may be 0; returns itself.

        Raises:
            ValueError: another shape, NaN or infinity. Nothing has been taken in then.
        """
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self._mean):
            raise ValueError(f"features: expected shape (n, {len(self._mean)}), not {rows.shape}")
        if len(rows):
            _refuse_non_finite(rows, "features")
            centre = rows.mean(axis=0)
            deviations = rows - centre
            self._join(len(rows), centre, deviations.T @ deviations)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in the rows that ``other`` has seen; returns itself, ``other`` stays as it is.

        Raises:
            ValueError: rows of another length.
        """
        if len(other._mean) != len(self._mean):
            raise ValueError(f"rows of {len(self._mean)} and of {len(other._mean)} numbers cannot be merged")
        if other.count:
            self._join(other.count, other._mean, other._scatter)
        return self

    def _join(self, count: int, mean: FloatArray, scatter: FloatArray) -> None:
        total = self.count + count
        step = mean - self._mean
        # Not in place: ``scatter`` and ``mean`` may be this object's own, where it is merged with itself.
        self._scatter = self._scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total


def frechet_distance(
    mean1: npt.ArrayLike, covariance1: npt.ArrayLike, mean2: npt.ArrayLike, covariance2: npt.ArrayLike
) -> float:
    """Fréchet distance of two Gaussians: ``|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½)``.

    The trace of the root is the sum of the roots of the eigenvalues of ``Σ1^½ Σ2 Σ1^½``, which is symmetric: no complex
    numbers arise and nothing is added to a diagonal, also where a covariance is singular (fewer rows than dimensions).

    Args:
        mean1: shape (d,).
        covariance1: shape (d, d), symmetric.
        mean2: shape (d,).
        covariance2: shape (d, d), symmetric.

    Returns:
        0 or more, float64; lower is better, 0 means equal.

    Raises:
        ValueError: shapes that differ, NaN or infinity, or a matrix that is no covariance.

    Source: Dowson and Landau 1982; FID: Heusel et al., arXiv:1706.08500, TTUR (Apache-2.0). Equals torch-fidelity
    (Apache-2.0) and clean-fid (MIT).
    """
    first_mean, first = _statistics(mean1, covariance1, "first")
    second_mean, second = _statistics(mean2, covariance2, "second")
    if len(first_mean) != len(second_mean):
        raise ValueError(f"dimensions {len(first_mean)} and {len(second_mean)} differ")
    step = first_mean - second_mean
    values, vectors = np.linalg.eigh(first)
    scaled = vectors * np.sqrt(_not_negative(values, np.trace(first)))
    product = _not_negative(np.linalg.eigvalsh(scaled.T @ second @ scaled), np.trace(first) * np.trace(second))
    distance = step @ step + np.trace(first) + np.trace(second) - 2 * np.sqrt(product).sum()
    return max(0.0, float(distance))


def fid(real: Moments, generated: Moments) -> float:
    """Fréchet distance of two sets' moments; with Inception-v3 pool features this is FID, with DINOv2 FD-DINOv2.

    Args:
        real: moments of the reference, at least 2 rows.
        generated: moments of the generated set, at least 2 rows. Their ``count`` belongs into every report.

    Returns:
        0 or more; lower is better. Biased upwards by about 1 / count: compare equal counts only.

    Raises:
        ValueError: as :func:`frechet_distance`, or fewer than 2 rows.

    Source: Heusel et al., arXiv:1706.08500; the bias: Chong and Forsyth, arXiv:1911.07023.
    """
    return frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)


def kid(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> Estimate:
    """Kernel Inception distance: unbiased MMD² with the kernel ``(x·y / d + 1)³``, over random subsets.

    Subsets are drawn without replacement by numpy's ``RandomState(seed)``, from ``generated`` first: with the same seed
    the numbers are torch-fidelity's, whose first input is the generated set.

    Args:
        real: shape (n, d), n at least ``subset_size``.
        generated: shape (m, d), m at least ``subset_size``.
        subsets: how many are drawn.
        subset_size: rows of each.
        seed: of the draws.

    Returns:
        Mean and standard deviation over subsets; lower is better, slightly below 0 is possible, no bias by count.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, or fewer rows than a subset.

    Source: Bińkowski et al., arXiv:1801.01401; equals torch-fidelity (Apache-2.0).
    """
    reference, made = _two_sets(real, generated, least=2)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"expected at least 1 subset of at least 2 rows, not {subsets} of {subset_size}")
    for rows, name in ((reference, "real"), (made, "generated")):
        if len(rows) < subset_size:
            raise ValueError(f"{name}: {len(rows)} rows are too few for subsets of {subset_size}")
    draw = np.random.RandomState(seed)
    found = np.empty(subsets)
    for number in range(subsets):
        one = made[draw.choice(len(made), subset_size, replace=False)]
        other = reference[draw.choice(len(reference), subset_size, replace=False)]
        found[number] = _unbiased_mmd(one, other)
    return Estimate(float(found.mean()), float(found.std()))


def prdc(real: npt.ArrayLike, generated: npt.ArrayLike, *, k: int = 5, chunk: int = 1024) -> PRDC:
    """Precision, recall, density and coverage from balls that reach to each row's ``k``-th nearest neighbour.

    Precision: share of generated rows inside any real ball; recall: share of real rows inside any generated ball;
    density: real balls that hold a generated row, counted, averaged and divided by k; coverage: share of real balls
    that hold a generated row. Inside means strictly nearer than the radius, as in prdc.

    Args:
        real: shape (n, d), n above ``k``.
        generated: shape (m, d), m above ``k``.
        k: neighbours, the row itself not counted. The papers use 3 (precision, recall) and 5 (density, coverage).
        chunk: rows per block; memory is about chunk² numbers beside the features.

    Returns:
        Four numbers, higher is better.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, or not more than ``k`` rows.

    Source: Kynkäänniemi et al., arXiv:1904.06991; Naeem et al., arXiv:2002.09797. Equals prdc (MIT).
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk: expected at least 1, not {k} and {chunk}")
    reference, made = _two_sets(real, generated, least=k + 1)
    # Distances do not change with the origin, and their rounding is smallest near the middle.
    middle = reference.mean(axis=0)
    reference, made = reference - middle, made - middle
    real_radii, made_radii = _radii(reference, k, chunk), _radii(made, k, chunk)
    inside_real = np.zeros(len(made), dtype=np.int64)
    inside_made = np.zeros(len(reference), dtype=bool)
    nearest_made = np.full(len(reference), np.inf)
    for rows in _blocks(len(reference), chunk):
        for columns in _blocks(len(made), chunk):
            squares = _squared_distances(reference[rows], made[columns])
            inside_real[columns] += (squares < real_radii[rows, None]).sum(axis=0)
            inside_made[rows] |= (squares < made_radii[columns]).any(axis=1)
            nearest_made[rows] = np.minimum(nearest_made[rows], squares.min(axis=1))
    return PRDC(
        precision=float((inside_real > 0).mean()),
        recall=float(inside_made.mean()),
        density=float(inside_real.mean() / k),
        coverage=float((nearest_made < real_radii).mean()),
    )


def vendi_score(features: npt.ArrayLike) -> float:
    """Vendi score, the effective number of different rows: ``exp(-Σ λ ln λ)`` over the eigenvalues λ of ``K / n``.

    K holds the cosines between rows. Where rows outnumber dimensions the same eigenvalues are taken from the d x d
    matrix.

    Args:
        features: shape (n, d), no row of zeros.

    Returns:
        1 (all rows alike) .. n (all at right angles); higher is more varied. It grows with n: compare equal counts
        only.

    Raises:
        ValueError: another shape, or rows that are zero, NaN or infinite.

    Source: Friedman and Dieng, arXiv:2210.02410; equals vendi-score (MIT).
    """
    if np.ndim(features) != 2:
        raise ValueError(f"features: expected shape (n, d), not {np.shape(features)}")
    rows = unit_rows(features)
    if not len(rows):
        raise ValueError("features: no rows")
    matrix = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    shares = np.linalg.eigvalsh(matrix / len(rows))
    shares = shares[shares > 0]
    # Rounding may carry it past the ends of its range.
    return float(np.clip(np.exp(-(shares * np.log(shares)).sum()), 1.0, len(rows)))


def cmmd(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    chunk: int = 1024,
) -> float:
    """CMMD: ``scale · (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))`` with ``k = exp(-|x - y|² / (2 sigma²))``.

    Rows are brought to length one first. The minimum-variance estimator is used, as published: the diagonals count.

    Args:
        real: CLIP embeddings, shape (n, d), no row of zeros.
        generated: shape (m, d).
        sigma: width of the kernel.
        scale: 1000 makes the number readable.
        chunk: rows per block; memory is about chunk² numbers beside the features.

    Returns:
        0 or more; lower is better. In float64: the references' float32 is right to three or four digits only.

    Raises:
        ValueError: shapes that do not fit, rows that are zero, NaN or infinite, or a sigma that is not positive.

    Source: Jayasumana et al., arXiv:2401.09603; google-research/cmmd and sayakpaul/cmmd-pytorch (both Apache-2.0).
    """
    if not sigma > 0 or chunk < 1:
        raise ValueError(f"sigma and chunk: expected above 0, not {sigma} and {chunk}")
    reference, made = _two_sets(real, generated, least=1)
    reference, made = unit_rows(reference, "real"), unit_rows(made, "generated")

    def mean_kernel(one: FloatArray, other: FloatArray) -> float:
        total = sum(
            # 1 - k is summed, for k is near 1 throughout and the differences are what counts.
            float(-np.expm1(_squared_distances(one[rows], other[columns]) / (-2 * sigma**2)).sum())
            for rows in _blocks(len(one), chunk)
            for columns in _blocks(len(other), chunk)
        )
        return total / (len(one) * len(other))

    distance = 2 * mean_kernel(reference, made) - mean_kernel(reference, reference) - mean_kernel(made, made)
    return max(0.0, scale * distance)


def inception_score(logits: npt.ArrayLike, *, splits: int = 10, shuffle: bool = True, seed: int = 2020) -> Estimate:
    """Inception score: ``exp(mean KL(p(y|x) ‖ p(y)))`` per split, p(y|x) the softmax of the logits.

    Rows are put in the order of numpy's ``RandomState(seed).permutation`` first, as torch-fidelity does.

    Args:
        logits: a classifier's outputs before the softmax, shape (n, classes), n at least ``splits``.
        splits: consecutive parts, as equal as can be.
        shuffle: False keeps the rows' order.
        seed: of the order.

    Returns:
        Mean and standard deviation over splits, 1..classes; higher is better.

    Raises:
        ValueError: another shape, NaN or infinity, or fewer rows than splits.

    Source: Salimans et al., arXiv:1606.03498; equals torch-fidelity (Apache-2.0). torchmetrics (Apache-2.0) differs in
    its shuffle and divides the deviation by ``splits - 1``.
    """
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, not {splits}")
    rows = _features(logits, "logits", least=splits)
    if shuffle:
        rows = rows[np.random.RandomState(seed).permutation(len(rows))]
    rows = rows - rows.max(axis=1, keepdims=True)
    logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    shares = np.exp(logs)
    scores = []
    for number in range(splits):
        part = slice(number * len(rows) // splits, (number + 1) * len(rows) // splits)
        marginal = shares[part].mean(axis=0)
        # A class that no row of the split reaches has p = 0 everywhere and adds nothing.
        gain = shares[part] * (logs[part] - np.log(np.where(marginal > 0, marginal, 1.0)))
        scores.append(np.exp(gain.sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def _unbiased_mmd(one: FloatArray, other: FloatArray) -> float:
    count, dimension = one.shape
    within = 0.0
    for rows in (one, other):
        kernel = (rows @ rows.T / dimension + 1) ** 3
        within += kernel.sum() - np.trace(kernel)
    between = ((one @ other.T / dimension + 1) ** 3).sum()
    return float(within / (count * (count - 1)) - 2 * between / count**2)


def _radii(rows: FloatArray, k: int, chunk: int) -> FloatArray:
    """Squared distance of each row to its k-th nearest other row; an equal row is another row, too."""
    radii = np.empty(len(rows))
    for here in _blocks(len(rows), chunk):
        nearest = np.empty((here.stop - here.start, 0))
        for there in _blocks(len(rows), chunk):
            nearest = np.concatenate([nearest, _squared_distances(rows[here], rows[there])], axis=1)
            if nearest.shape[1] > k + 1:
                nearest = np.partition(nearest, k, axis=1)[:, : k + 1]
        # The row itself is among them, at a distance of 0.
        radii[here] = nearest.max(axis=1)
    return radii


def _squared_distances(one: FloatArray, other: FloatArray) -> FloatArray:
    lengths = np.einsum("nd,nd->n", one, one)[:, None] + np.einsum("nd,nd->n", other, other)
    squares = lengths - 2 * (one @ other.T)
    # What the subtraction cannot tell from zero is zero: equal rows must be at no distance at all.
    squares[squares <= lengths * (np.finfo(np.float64).eps * one.shape[1])] = 0.0
    return squares


def _blocks(count: int, chunk: int) -> Iterator[slice]:
    for start in range(0, count, chunk):
        yield slice(start, min(start + chunk, count))


def _two_sets(real: npt.ArrayLike, generated: npt.ArrayLike, *, least: int) -> tuple[FloatArray, FloatArray]:
    reference, made = _features(real, "real", least), _features(generated, "generated", least)
    if reference.shape[1] != made.shape[1]:
        raise ValueError(f"rows of {reference.shape[1]} and of {made.shape[1]} numbers cannot be compared")
    return reference, made


def _features(features: npt.ArrayLike, name: str, least: int) -> FloatArray:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (n, d), not {rows.shape}")
    if len(rows) < least:
        raise ValueError(f"{name}: {len(rows)} rows are too few, at least {least} are needed")
    _refuse_non_finite(rows, name)
    return rows


def _refuse_non_finite(rows: FloatArray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if bad.size > 5 else "")
        raise ValueError(f"{name}: NaN or infinity in row {shown}")


def _statistics(mean: npt.ArrayLike, covariance: npt.ArrayLike, name: str) -> tuple[FloatArray, FloatArray]:
    centre, spread = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if centre.ndim != 1 or not centre.size or spread.shape != (len(centre), len(centre)):
        raise ValueError(f"{name}: expected shapes (d,) and (d, d), not {centre.shape} and {spread.shape}")
    if not (np.isfinite(centre).all() and np.isfinite(spread).all()):
        raise ValueError(f"{name}: NaN or infinity in the mean or the covariance")
    if np.abs(spread - spread.T).max() > _ASYMMETRY * np.abs(spread).max():
        raise ValueError(f"{name}: the covariance is not symmetric")
    return centre, (spread + spread.T) / 2


def _not_negative(values: npt.NDArray[np.floating], largest: float) -> FloatArray:
    if values.min() < -_NEGATIVE * max(largest, 0.0):
        raise ValueError(f"not a covariance: it has a negative eigenvalue ({values.min():.3g})")
    return np.maximum(values, 0.0, dtype=np.float64)
