"""How the energy of a weight or gradient spreads over spatial frequencies, before and after the frequency filter.

The transform is the orthonormal DCT-II: it keeps the sum of squares, and it is the one in which the optimizer's
filter g + (frequency_penalty / 8) · laplacian(g) is a plain product with 1 - (frequency_penalty / 8) · (4 sin²(πp / 2R)
+ 4 sin²(πq / 2C)) at mode (p, q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from automagic_bnb import config, reference
from automagic_bnb.state import local_tensor

SMALLEST = 3
"""Rows and columns from which the optimizer filters a matrix."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PIECE = 2**22
"""Elements transformed at once, unless one slice has more."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Power over spatial frequency of one tensor, averaged over its R×C slices.

    The radius of mode (p, q) is √((p/R)² + (q/C)²) / √2: 0 is the mean of a slice, nearly 1 a chequerboard.
    """

    shape: tuple[int, ...]
    """Of the tensor; the last two are R and C."""
    cutoff: float
    frequency_penalty: float
    radius: Tensor
    """Middle of each bin, float64 [bins]."""
    power_before: Tensor
    """Mean squared coefficient in each bin, float64 [bins]; NaN where no mode falls into it."""
    power_after: Tensor
    """The same after the filter."""
    energy_before: float
    """Sum of squares of all elements."""
    energy_after: float
    high_share_before: float
    """Share of that energy beyond the cut-off radius; NaN where all is 0."""
    high_share_after: float


def spectrum(tensor: Tensor, cutoff: float = 0.5, frequency_penalty: float | None = None, bins: int = 32) -> Spectrum:
    """The spatial spectrum of a weight or a gradient, as it is and as step 1's frequency filter leaves it.

    Args:
        tensor: [..., R, C] with R and C at least 3, real, any dtype and device, as `layer.weight` or
            `layer.weight.grad`; of more than two dimensions each slice over the last two is transformed. Of a DTensor,
            the shard that lives here.
        cutoff: radius, above 0 and below 1, beyond which energy counts as high.
        frequency_penalty: the filter's strength, 0 to 1; None: the optimizer's default.
        bins: equal intervals of the radius.

    Raises:
        TypeError: not a tensor, or complex, or an option of the wrong type.
        ValueError: too few dimensions, slices too small, NaN or infinite elements, or an option out of range.

    Example:
        >>> spectrum(layer.weight.grad, cutoff=0.6).high_share_before
    """
    slices = _checked(tensor)
    _check_options(cutoff, bins)
    default = config.AutomagicConfig.frequency_penalty
    penalty = default if frequency_penalty is None else config.check_option("frequency_penalty", frequency_penalty)
    energies = _energies(slices, penalty)
    radius = _radii(*slices.shape[-2:])
    place = (radius * bins).long().flatten()
    modes = torch.bincount(place, minlength=bins) * len(slices)
    powers = [torch.bincount(place, x.flatten(), minlength=bins) / modes for x in energies]
    totals = [x.sum().item() for x in energies]
    shares = [x[radius > cutoff].sum().item() / x.sum().item() if x.any() else math.nan for x in energies]
    return Spectrum(
        shape=tuple(tensor.shape),
        cutoff=float(cutoff),
        frequency_penalty=penalty,
        radius=(torch.arange(bins, dtype=torch.float64) + 0.5) / bins,
        power_before=powers[0],
        power_after=powers[1],
        energy_before=totals[0],
        energy_after=totals[1],
        high_share_before=shares[0],
        high_share_after=shares[1],
    )


def _check_options(cutoff: float, bins: int) -> None:
    if not config.is_number(cutoff):
        raise TypeError(f"cutoff={cutoff!r}: must be a number above 0 and below 1")
    if not 0 < cutoff < 1:
        raise ValueError(f"cutoff={cutoff!r}: must be above 0 and below 1, the radius of the highest frequency")
    config.check_whole("bins", bins, 1, "a whole number, {} or more")


def _checked(tensor: Tensor) -> Tensor:
    """The tensor as slices [n, R, C]."""
    x = measurable(tensor, "a spectrum")
    if min(x.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"a spectrum needs at least {SMALLEST} rows and columns; this tensor has shape {tuple(x.shape)}, "
            "and the optimizer does not filter it either"
        )
    return x.reshape(-1, *x.shape[-2:])


def measurable(tensor: Tensor, what: str) -> Tensor:
    """The (local) tensor without its history, floating point, once it is known to be one that can be measured.

    Args:
        what: the subject of an error's sentence.

    Raises:
        TypeError: not a tensor, or complex or sparse.
        ValueError: fewer than two dimensions, no elements, or NaN or infinite ones.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} needs a tensor, not {type(tensor).__name__} (a gradient may still be None)")
    x = local_tensor(tensor).detach()
    if x.is_complex() or x.layout != torch.strided:
        raise TypeError(f"{what} needs a dense real tensor; this one is {x.dtype}, {x.layout}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"{what} needs at least 2 dimensions and an element; this tensor has shape {tuple(x.shape)}")
    x = x if x.dtype in FLOATS else x.double()  # 8-bit floats lack most operations
    if not (finite := torch.isfinite(x)).all():
        raise ValueError(f"{what} needs finite elements; {int((~finite).sum())} of {x.numel()} are NaN or infinite")
    return x


def _radii(rows: int, columns: int) -> Tensor:
    """Radius of each mode, float64 [R, C], from 0 to below 1."""
    p, q = (torch.arange(n, dtype=torch.float64) / n for n in (rows, columns))
    return (p[:, None].square() + q.square()).sqrt() / math.sqrt(2)


def _energies(slices: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Squared coefficients summed over slices [n, R, C], before and after the filter; float64 [R, C] on the CPU."""
    before = torch.zeros(slices.shape[-2:], dtype=torch.float64, device=slices.device)
    after = before.clone()
    for piece in slices.split(max(1, PIECE // slices[0].numel())):
        x = piece.double()
        before += dct2(x).square().sum(dim=0)
        after += dct2(x + (penalty / 8) * reference.laplacian(x)).square().sum(dim=0)
    return before.cpu(), after.cpu()


def dct2(x: Tensor) -> Tensor:
    """The orthonormal DCT-II over the last two dimensions; equals `scipy.fft.dctn(norm="ortho")` over them."""
    return _dct(_dct(x).mT).mT


def _dct(x: Tensor) -> Tensor:
    """The same over the last dimension, by one FFT of its length (Makhoul 1980)."""
    n = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    angle = torch.arange(n, dtype=x.dtype, device=x.device) * (-math.pi / (2 * n))
    coefficients = (torch.fft.fft(folded) * torch.polar(torch.ones_like(angle), angle)).real * math.sqrt(2 / n)
    coefficients[..., 0] /= math.sqrt(2)
    return coefficients
