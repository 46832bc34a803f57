"""Sums of rank-one tensors: alternating least squares, pursuit, damped Gauss-Newton.

All functions take a batch of tensors (B, d1, ..., dN) in float64 and give factors, one (B, dn, R)
for each mode: the tensor is the sum over r of the outer products of their columns.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from gracile.errors import UserError
from gracile.lowrank.spectral import signs

Factors = list[Tensor]

HOWS = ("random", "greedy", "nls")


def fit(
    tensor: Tensor,
    rank: int,
    generator: torch.Generator,
    *,
    how: str = "random",
    starts: int = 2,
    sweeps: int = 100,
    steps: int = 50,
) -> Factors:
    """Factors of a rank, their columns of equal norms, strongest terms first.

    Args:
        tensor: (B, d1, ..., dN).
        rank: terms.
        generator: of the starts.
        how: random (alternating least squares, the best of several starts), greedy (one term after
            another, none touched again), nls (Gauss-Newton on all factors at once, from the better
            of the two).
        starts: random starts.
        sweeps: of alternating least squares, at most.
        steps: of Gauss-Newton, at most.

    Raises:
        UserError: `how` is none of these.
    """
    if how not in HOWS:
        raise UserError(f"how must be one of {', '.join(HOWS)}, got '{how}'.")
    found: list[Factors] = []
    if how != "greedy":
        for _ in range(starts):
            begin = random_factors(tensor, rank, generator)
            found.append(alternating(tensor, begin, sweeps=sweeps)[0])
    if how != "random":
        found.append(greedy(tensor, rank, generator))
    best = _best(tensor, found)
    if how == "nls":
        best = gauss_newton(tensor, best, steps=steps)
    return balanced(best)


def random_factors(tensor: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Normally distributed factors; drawn on the generator's device, so the same everywhere."""
    shapes = [(len(tensor), d, rank) for d in tensor.shape[1:]]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [f.to(tensor.device) for f in drawn]


def rebuilt(factors: Sequence[Tensor]) -> Tensor:
    """The tensors (B, d1, ..., dN) these factors stand for."""
    flat = factors[0] @ _khatri_rao(factors[1:]).mT
    return flat.reshape(len(flat), *(f.shape[1] for f in factors))


def squared_error(tensor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """(B,) sum of squared differences."""
    return (tensor - rebuilt(factors)).flatten(1).square().sum(1)


def alternating(
    tensor: Tensor,
    factors: Sequence[Tensor],
    *,
    sweeps: int = 100,
    ridge: float = 1e-6,
    tolerance: float = 1e-9,
) -> tuple[Factors, list[Tensor]]:
    """Alternating least squares; no update makes the error larger.

    Each factor in turn becomes the minimizer of the squared error + `ridge` times the squared
    change of the factor, with the columns of all others normalized. A ridge on the change keeps
    the normal equations solvable as one on the factor does, without a bias.

    Args:
        tensor: (B, d1, ..., dN).
        factors: where to begin.
        sweeps: at most as many.
        ridge: relative to the normal equations, whose diagonal is 1.
        tolerance: ends when no tensor's error falls by this share of its squared norm in a sweep.

    Returns:
        Factors, all but the first with columns of norm 1; squared errors (B,) after each sweep.

    Source:
        Lebedev et al. 2015, arXiv:1412.6553; Kolda & Bader 2009, algorithm ALS, with the proximal
        term of Li, Kindermann & Navasca 2013.
    """
    now = list(factors)
    energy = tensor.flatten(1).square().sum(1)
    eye = ridge * torch.eye(now[0].shape[-1], dtype=tensor.dtype, device=tensor.device)
    for n in range(len(now) - 1, 0, -1):
        _hand_on(now, n, 0)
    errors: list[Tensor] = []
    for _ in range(sweeps):
        error = energy
        for n in range(len(now)):
            product = _projected(tensor, now, n)
            gram = _grams(now, n)
            right = product + ridge * now[n]
            now[n] = torch.linalg.solve(gram + eye, right.mT).mT
            own = now[n].mT @ now[n]
            error = energy - 2 * (product * now[n]).sum((1, 2)) + (gram * own).sum((1, 2))
            _hand_on(now, n, (n + 1) % len(now))
        errors.append(error.clamp(min=0))
        if len(errors) > 1 and (errors[-2] - errors[-1] <= tolerance * energy).all():
            break
    return now, errors


def greedy(
    tensor: Tensor, rank: int, generator: torch.Generator, *, sweeps: int = 30, starts: int = 4
) -> Factors:
    """One rank-one term after another, each fitted to what the ones before leave.

    Args:
        tensor: (B, d1, ..., dN).
        rank: terms.
        generator: of the starts of each term.
        sweeps: of alternating least squares for each term, at most.
        starts: of each term; the best is taken.

    Source:
        Denton et al. 2014, arXiv:1404.0736.
    """
    left = tensor
    terms: list[Factors] = []
    for _ in range(rank):
        terms.append(_strongest(left, random_factors(tensor, starts, generator), sweeps))
        left = left - rebuilt(terms[-1])
    return [torch.cat(mode, -1) for mode in zip(*terms, strict=True)]


def _strongest(tensor: Tensor, starts: Factors, sweeps: int) -> Factors:
    """The best term of rank one that alternating least squares finds; each column is a start."""
    now = starts
    for n in range(1, len(now)):
        _hand_on(now, n, 0)
    energy, before = tensor.flatten(1).square().sum(1), torch.zeros(len(tensor)).to(tensor)
    for _ in range(sweeps):
        for n in range(len(now)):
            if n > 0:
                _hand_on(now, n - 1, n)
            now[n] = _projected(tensor, now, n)  # all others have norm 1
        size = now[-1].norm(dim=1)  # (B, starts): what a term takes away is its square
        taken = size.amax(1).square()
        done = bool((taken - before <= 1e-6 * energy).all())
        before = taken
        if done:
            break
        _hand_on(now, len(now) - 1, 0)
    else:
        _hand_on(now, 0, len(now) - 1)
    best = now[-1].norm(dim=1).argmax(1)[:, None, None]
    return [f.gather(2, best.expand(-1, f.shape[1], -1)) for f in now]


def gauss_newton(
    tensor: Tensor,
    factors: Sequence[Tensor],
    *,
    steps: int = 50,
    inner: int = 100,
    tolerance: float = 1e-5,
) -> Factors:
    """Levenberg-Marquardt on all factors at once; the error never grows.

    The normal equations are never formed: their product with a direction needs only the R x R
    matrices A^T A of each mode, so conjugate gradients solve them, preconditioned by each mode's
    own block.

    Args:
        tensor: (B, d1, ..., dN); each of the batch goes its own way.
        factors: where to begin.
        steps: at most as many.
        inner: steps of conjugate gradients for each, at most.
        tolerance: ends when a step that is much as expected lowers the squared error by less than
            this share of itself.

    Source:
        Sorber, Van Barel & De Lathauwer 2013, SIAM J. Optim. 23(2), section 4; damping by Nielsen
        1999.
    """
    begin = balanced(factors)
    done = [
        _gauss_newton(tensor[b : b + 1], [f[b : b + 1] for f in begin], steps, inner, tolerance)
        for b in range(len(tensor))
    ]
    return [torch.cat(mode) for mode in zip(*done, strict=True)]


def balanced(factors: Sequence[Tensor]) -> Factors:
    """The same tensors; columns of a term have one norm in all modes, strongest terms first.

    In all modes but the first the largest element of a column is positive.
    """
    now = list(factors)
    for n in range(1, len(now)):
        sign = signs(now[n], 1).unsqueeze(1)
        now[n], now[0] = now[n] * sign, now[0] * sign
    norms = torch.stack([f.norm(dim=1) for f in now])  # (modes, B, R)
    size = norms.prod(0)
    goal = size ** (1 / len(now))
    scale = goal / torch.where(norms > 0, norms, 1.0)  # a term with a zero column vanishes
    order = size.argsort(dim=-1, descending=True, stable=True).unsqueeze(1)
    scaled = [f * s.unsqueeze(1) for f, s in zip(now, scale, strict=True)]
    return [f.gather(2, order.expand_as(f)) for f in scaled]


def _gauss_newton(
    tensor: Tensor, factors: Factors, steps: int, inner: int, tolerance: float
) -> Factors:
    energy = float(tensor.square().sum())
    error = float(squared_error(tensor, factors))
    damping, growth = 1e-3 * max(float(_grams(factors, 0).diagonal(dim1=1, dim2=2).max()), 1e-30), 2
    for _ in range(steps):
        if error <= 1e-28 * energy:
            break
        modes = range(len(factors))
        slope = [factors[n] @ _grams(factors, n) - _projected(tensor, factors, n) for n in modes]
        move = _solve(factors, slope, damping, inner)
        expected = damping * _dot(move, move) - _dot(move, slope)  # of the squared error
        tried = [f + m for f, m in zip(factors, move, strict=True)]
        after = float(squared_error(tensor, tried))
        gain = (error - after) / expected if expected > 0 else -1.0
        if gain <= 0:
            damping, growth = damping * growth, growth * 2
            if growth > 2**20:
                break
            continue
        small = error - after <= tolerance * error and gain > 0.25
        factors, error = tried, after
        damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2
        if small:
            break
    return factors


def _solve(factors: Factors, slope: Factors, damping: float, inner: int) -> Factors:
    """x with (J^T J + damping) x = -slope, to a thousandth."""
    modes = range(len(factors))
    eye = torch.eye(factors[0].shape[-1], dtype=slope[0].dtype, device=slope[0].device)
    own = [_grams(factors, n) + damping * eye for n in modes]
    pairs = {(n, m): _grams(factors, n, m) for n in modes for m in modes if n != m}

    def times(x: Factors) -> Factors:
        out = [x[n] @ own[n] for n in modes]
        inside = [x[m].mT @ factors[m] for m in modes]
        for (n, m), gram in pairs.items():
            out[n] = out[n] + factors[n] @ (gram * inside[m])
        return out

    def conditioned(r: Factors) -> Factors:
        return [torch.linalg.solve(own[n], r[n].mT).mT for n in modes]

    x = [torch.zeros_like(s) for s in slope]
    left = [-s for s in slope]
    step = conditioned(left)
    now = begin = _dot(left, step)
    for _ in range(inner):
        if now <= 1e-6 * begin:
            break
        image = times(step)
        length = now / _dot(step, image)
        x = [a + length * b for a, b in zip(x, step, strict=True)]
        left = [a - length * b for a, b in zip(left, image, strict=True)]
        ready = conditioned(left)
        before, now = now, _dot(left, ready)
        step = [a + now / before * b for a, b in zip(ready, step, strict=True)]
    return x


def _dot(a: Factors, b: Factors) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _grams(factors: Sequence[Tensor], *without: int) -> Tensor:
    """(B, R, R) elementwise product of A^T A of all modes but these."""
    grams = [f.mT @ f for n, f in enumerate(factors) if n not in without]
    first = factors[0]
    ones = torch.ones_like(first[:, :1, :]).mT @ torch.ones_like(first[:, :1, :])
    return reduce(torch.mul, grams, ones)


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """(B, d1 ... dN, R): products of the columns, first mode slowest."""

    def joined(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2)

    return reduce(joined, factors)


def _projected(tensor: Tensor, factors: Sequence[Tensor], n: int) -> Tensor:
    """(B, dn, R): the tensor, unfolded along a mode, times the others' Khatri-Rao product."""
    modes = list(range(len(factors)))
    # The longest mode goes first, so that nothing larger than what is left of it times R is held.
    order = sorted((m for m in modes if m != n), key=lambda m: -tensor.shape[m + 1])
    modes.remove(order[0])
    moved = tensor.movedim(order[0] + 1, -1)
    out: Tensor = (moved.flatten(1, -2) @ factors[order[0]]).unflatten(1, moved.shape[1:-1])
    for m in order[1:]:
        at = modes.index(m)
        ones = [1] * len(modes)
        ones[at] = -1
        by = factors[m].reshape(len(tensor), *ones, factors[m].shape[-1])
        out = (out * by).sum(at + 1)
        modes.remove(m)
    return out


def _hand_on(factors: Factors, n: int, to: int) -> None:
    """Normalize the columns of one mode; another one takes the norms."""
    norms = factors[n].norm(dim=1, keepdim=True)
    norms = torch.where(norms > 0, norms, 1.0)
    factors[n], factors[to] = factors[n] / norms, factors[to] * norms


def _best(tensor: Tensor, found: Sequence[Factors]) -> Factors:
    """For each tensor of the batch the factors with the least error."""
    if len(found) == 1:
        return list(found[0])
    errors = torch.stack([squared_error(tensor, f) for f in found])
    which = errors.argmin(0)
    rows = torch.arange(len(tensor), device=tensor.device)
    return [torch.stack(mode)[which, rows] for mode in zip(*found, strict=True)]
