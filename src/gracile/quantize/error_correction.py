"""Codebooks and codes fitted to a layer's responses instead of its weights.

Wu et al. 2016, arXiv:1512.06473, section 3.3 and 3.4: block coordinate descent over the stretches
of input channels, eq. 7-10 for linear layers, eq. 11-12 for convolutions. They hold activations;
here all is in the Gram matrix of the inputs, and the codebook of a stretch is solved for as a whole
(the vectors of a convolution meet in its responses).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-6  # pull to the present vectors, as a share of the mean square of the inputs


def fit_responses(
    codebook: Tensor, codes: Tensor, gram: Tensor, right: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Lower sum |Y - W X|^2 over codebook and codes in turn; W = `restore(codebook, codes)`.

    Args:
        codebook: (S, K, d), of S stretches of d input channels.
        codes: (O, S, ...), int64.
        gram: (G, P, P) sum of x x^T; P counts input channels of a group, then kernel positions.
        right: (G, P, O/G) sum of x y^T.
        rounds: times that every stretch has its turn.

    Returns:
        Codebook and codes, of the same shapes. No step makes the error larger, but for the ridge.
    """
    stretches, _, size = codebook.shape
    groups, per = right.shape[0], right.shape[2]
    book = codebook.double()
    here = codes.reshape(groups, per, stretches, -1)  # (G, o, S, p)
    places = here.shape[-1]
    cross = _by_stretch(right, 1, stretches, size, places)  # (G, S, d, p, o)
    squares = _by_stretch(gram, 1, stretches, size, places)
    squares = _by_stretch(squares, 4, stretches, size, places)  # (G, S, d, p, S, d, p)
    pull = RIDGE * float(gram.diagonal(dim1=1, dim2=2).mean()) + 1e-12
    here, book = here.clone(), book.clone()
    for _ in range(rounds):
        before = here.clone(), book.clone()
        for s in range(stretches):
            own = squares[:, s, :, :, s]  # (G, d, p, d, p)
            all_now = _vectors(book, here)  # (G, o, S, p, d)
            seen = torch.einsum("gdpseq,gosqe->gdpo", squares[:, s], all_now)
            mine = torch.einsum("gdpeq,goqe->gdpo", own, all_now[:, :, s])
            rest = cross[:, s] - seen + mine  # what this stretch should give
            book[s] = _solve_book(book[s], here[:, :, s], own, rest, pull)
            here[:, :, s] = _choose_codes(book[s], here[:, :, s], own, rest)
        if torch.equal(before[0], here) and torch.allclose(before[1], book, rtol=1e-4):
            break
    return book.to(codebook.dtype), here.reshape(codes.shape)


def response_error(weight: Tensor, gram: Tensor, right: Tensor) -> float:
    """sum |Y - W X|^2, but for the constant sum |Y|^2.

    Args:
        weight: (O, I, ...).
        gram, right: see `fit_responses`.
    """
    flat = weight.double().reshape(right.shape[0], right.shape[2], -1).transpose(1, 2)
    return float((flat * (gram @ flat - 2 * right)).sum())


def _by_stretch(x: Tensor, dim: int, stretches: int, size: int, places: int) -> Tensor:
    """Split a dim (channels, then places) into stretch, channel in it and place; zeros fill up."""
    parts = x.unflatten(dim, (-1, places))
    short = stretches * size - parts.shape[dim]
    fill = parts.new_zeros(*parts.shape[:dim], short, *parts.shape[dim + 1 :])
    whole: Tensor = torch.cat([parts, fill], dim).unflatten(dim, (stretches, size))
    return whole


def _vectors(book: Tensor, here: Tensor) -> Tensor:
    """(G, o, S, p, d): the vector of each code."""
    words = book.shape[1]
    first = words * torch.arange(book.shape[0], device=here.device).reshape(1, 1, -1, 1)
    return book.flatten(0, 1)[here + first]


def _solve_book(book: Tensor, codes: Tensor, own: Tensor, rest: Tensor, pull: float) -> Tensor:
    """Least squares of all vectors of one stretch, codes as they are (eq. 9)."""
    words, size = book.shape
    left = book.new_zeros(words, size, words, size)
    right = pull * book
    for g in range(len(codes)):
        chosen = F.one_hot(codes[g], words).to(book.dtype)  # (o, p, K)
        together = torch.einsum("opk,oql->pqkl", chosen, chosen)
        left += torch.einsum("pqkl,dpeq->kdle", together, own[g])
        right = right + torch.einsum("opk,dpo->kd", chosen, rest[g])
    flat = left.reshape(words * size, -1)
    flat.diagonal().add_(pull)
    found: Tensor = torch.linalg.solve(flat, right.flatten())
    return found.reshape(words, size)


def _choose_codes(book: Tensor, codes: Tensor, own: Tensor, rest: Tensor) -> Tensor:
    """The best vector for each output, place after place, vectors as they are (eq. 10 and 12)."""
    codes = codes.clone()
    for p in range(codes.shape[2]):
        now = book[codes]  # (G, o, p, d)
        now[:, :, p] = 0
        wanted = rest[:, :, p] - torch.einsum("gdeq,goqe->gdo", own[:, :, p], now)
        square = torch.einsum("kd,gde,ke->gk", book, own[:, :, p, :, p], book)
        cost = square[:, None] - 2 * torch.einsum("gdo,kd->gok", wanted, book)
        codes[:, :, p] = cost.argmin(2)
    return codes
