"""Centred kernel alignment: how alike two representations of the same rows are."""

import torch


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    r"""
    Linear CKA of two sets of features (Kornblith et al., 2019, arXiv 1905.00414, section 3):
    \\(\|Y^\top X\|_F^2 / (\|X^\top X\|_F\,\|Y^\top Y\|_F)\\) of the column-centred features.

    Args:
        x (`torch.Tensor` of shape `(rows, features)`): one representation.
        y (`torch.Tensor` of shape `(rows, other_features)`): another one of the same rows.

    Returns:
        `float`: within `[0, 1]`; `1.0` where both are constant over the rows, and `0.0` where just one is.
    """
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    # Grams over the rows: the cost does not depend on the number of features.
    k, l = x @ x.T, y @ y.T  # noqa: E741 - the paper's symbols
    scale = k.norm() * l.norm()
    if scale == 0:
        return float(k.norm() == l.norm())
    return float((k * l).sum() / scale)
