"""Singular values of a weight, and how many directions it really uses."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_bnb import low_rank
from automagic_bnb.state import matrix_shape
from automagic_bnb.watch.spectrum import measurable


def singular_values(param: Tensor) -> Tensor:
    """Singular values in descending order, float64 [min(rows, columns)], on the parameter's device.

    They come from the Gram matrix of the short side in double precision: cheap for LoRA matrices, and exact to about
    1e-8 of the largest. A value below that is noise.

    Args:
        param: a weight or gradient of two dimensions or more, real; [rows, ...] counts as rows × the rest, as a
            convolution is. Of a DTensor, the shard that lives here.

    Raises:
        TypeError: not a tensor, or complex or sparse.
        ValueError: fewer than two dimensions, no elements, or NaN or infinite ones.
    """
    x = measurable(param, "a singular value")
    matrix = x.reshape(matrix_shape(x)).double()
    # The Gram matrix squares: scaled to 1, no finite matrix overflows or vanishes in it.
    scale = matrix.abs().amax()
    return low_rank.singular_values(matrix / torch.where(scale > 0, scale, 1.0)) * scale


def effective_rank(param: Tensor) -> float:
    """exp of the entropy of the singular values' shares σ / Σσ, from 1 to the rank; 0 for a matrix of zeros.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. Equal singular values give their number; a few large ones
    count, many small ones hardly do. Arguments and errors as `singular_values`.
    """
    values = singular_values(param)
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def stable_rank(param: Tensor) -> float:
    """Σσ² / max σ², from 1 to the rank; 0 for a matrix of zeros. Arguments and errors as `singular_values`."""
    values = singular_values(param)
    return (values.square().sum() / values[0].square()).item() if values[0] > 0 else 0.0
