"""What is left of a Hessian when the model is linear: the Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any, NoReturn

from spectra.errors import ArgumentTypeError
from spectra.operators.hessian import HessianOperator

__all__ = ["GaussNewtonOperator"]


class GaussNewtonOperator(HessianOperator):
    """The Hessian of the loss of the linearised model, G = Jᵀ H_ℓ J.

    J is the Jacobian of what the model returns by the parameters, H_ℓ the Hessian of the loss by
    that. With H the Hessian, H − G is what the curvature of the model itself adds: write `H - G`.
    G has no negative eigenvalues where the loss is convex in the model's outputs, as cross-entropy
    and mean squared error are; for losses that are the negative logarithm of an exponential family
    in its natural parameters (those two among them) it is the Fisher information matrix, expected
    over the model's own predictions.

    Everything else is as of `HessianOperator`: parameters and options, the weighting of batches,
    blocks, gradient and value, which are those of the loss itself. A product is exact to rounding
    and takes about two thirds of one of the Hessian on a kept graph.

    What the loss computes from parameters directly, such as a penalty on their norm, is no part of
    the model and is differentiated as it is. The linearisation is of what a call of the model
    returns; the head of a language model, whose logits are made in chunks, is part of it.

    Raises
    ------
    LossError
        In the first product: the loss does not call the model, or the model computes the loss by
        itself, so that nothing is left when it is linearised.
    ArgumentError, ArgumentTypeError, ParameterSelectionError, StochasticModelError, DataError,
    DoubleBackwardError
        As of `HessianOperator`.

    References
    ----------
    Schraudolph, 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    Martens, 2020, "New insights and perspectives on the natural gradient method" (Fisher).

    Examples
    --------
    >>> import torch, spectra
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> loss = spectra.losses.supervised(torch.nn.MSELoss())
    >>> G = spectra.GaussNewtonOperator(model, loss, [(x, torch.zeros(1, 1))])
    >>> G.to_dense()  # 2 xᵀx
    tensor([[2., 4.],
            [4., 8.]])
    """

    _linearised = True

    @classmethod
    def from_function(cls, *args: Any, **options: Any) -> NoReturn:
        """Not of a plain function: which part of it would be the model?

        Raises
        ------
        ArgumentTypeError
            Always.
        """
        msg = (
            "a plain function does not tell which part of it is the model to linearise; make that "
            "part a torch.nn.Module and pass GaussNewtonOperator(model, loss, data)"
        )
        raise ArgumentTypeError(msg)
