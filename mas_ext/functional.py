r"""MAS on lists of tensors: one pass over memory, one launch for a whole model.

Every function takes lists with one tensor per parameter: ``params`` θ and ``anchors`` θ* of one
dtype (float32, float64, bfloat16 or float16) and ``omega`` Ω in the accumulation dtype (float64
for float64 parameters, float32 for the others). Tensors at one position have one shape, with any
strides. All tensors are on one device. Lists may mix shapes and dtypes and may be empty. Functions
whose name ends in ``_`` write to their first argument (optimizer steps also to their moments). What
is written may not share memory with any other argument.

Where Ω is only read and the parameters are not float64, it may also be bfloat16, or uint8 codes of
:mod:`mas_ext.precision`. Codes must be dense and need ``omega_scales``: one tensor for each Ω,
float32 [⌈elements/256⌉] for codes and without elements for the others. Kernels dequantize Ω as they
read it.

``lambda_reg``, ``lr``, ``grad_scale`` and ``found_inf`` are numbers or 0-dim float tensors. A
tensor on the device is read there: nothing waits for the host, a captured CUDA graph sees new
values, and ``torch.compile`` does not recompile for them.

:func:`accumulate_outer_`, :func:`low_rank_penalty` and :func:`low_rank_penalty_grad_` work on one
parameter and take single tensors.

Errors: ``RuntimeError``, which names the tensor and the remedy, or ``ValueError`` for an unknown
reduction or mode; raised before anything is written.

:mod:`mas_ext.reference` has the same functions in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mas_ext._operators import native as _native  # noqa: F401  (loads the compiled kernels)
from mas_ext._operators.registration import writing
from mas_ext.reference import check_reduction

__all__ = [
    "accumulate_abs_matmul_",
    "accumulate_importance_",
    "accumulate_outer_",
    "adamw_step_",
    "add_penalty_grad_",
    "low_rank_penalty",
    "low_rank_penalty_grad_",
    "penalty",
    "penalty_and_grad",
    "proximal_step_",
    "sgd_step_",
]

Tensors = Sequence[Tensor]
Scalar = float | Tensor

_accumulate_importance = writing("accumulate_importance_")
_accumulate_outer = writing("accumulate_outer_")
_add_penalty_grad = writing("add_penalty_grad_")
_low_rank_penalty_grad = writing("low_rank_penalty_grad_")
_proximal_step = writing("proximal_step_")
_sgd_step = writing("sgd_step_")
_adamw_step = writing("adamw_step_")


def _scalar(name: str, value: Scalar) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not 0 <= value < math.inf:  # torch.compile can guard comparisons
        raise ValueError(f"{name} is {value}; pass a finite number that is not negative")
    return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def _listed(tensors: Tensors) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else list(tensors)


def _is_square(reduction: str) -> bool:
    check_reduction(reduction)
    return reduction == "square"


def accumulate_importance_(
    omega: Tensors, grads: Tensors, scale: float = 1.0, reduction: str = "abs"
) -> None:
    r"""Adds a gradient's magnitude, or its square, to the importance, in place.

    .. math:: \Omega_i \leftarrow \Omega_i + \text{scale} \cdot f(g_i),
        \qquad f(g) = |g| \text{ or } g^2

    For the exact importance, call it with the gradient of one sample at a time: the absolute value
    (or the square) of a batch's mean gradient is not the mean of the samples' absolute values
    (or squares).

    Args:
        omega: Ω, float32 (float64 beside float64 gradients); written.
        grads: gradients, in the shapes of ``omega``.
        scale: a finite number ≥ 0.
        reduction: ``"abs"`` or ``"square"``. Squares are formed in the dtype of ``omega``, also
            those of bfloat16 and float16 gradients.

    Source: Aljundi et al., ECCV 2018, equation 2. With ``"square"`` and the gradients of a
    sample's log-likelihood, Ω is the diagonal of the Fisher information: Kirkpatrick et al.,
    PNAS 2017.
    """
    _accumulate_importance(_listed(omega), _listed(grads), scale, _is_square(reduction))


def accumulate_outer_(
    omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, reduction: str = "abs"
) -> None:
    r"""Adds the magnitude of each sample's matrix product, or its square, to the importance.

    .. math:: \Omega_{pd} \leftarrow \Omega_{pd} + \text{scale} \cdot
        \sum_b f\Bigl( \sum_t \text{left}_{btp}\,\text{right}_{btd} \Bigr),
        \qquad f(x) = |x| \text{ or } x^2

    With output gradients on the left, inputs on the right, and t running over a sample's
    positions, the inner sum is sample b's gradient for the weight of a linear layer (or of a
    convolution, if the right factor is a view of the input's patches). Ω gets the exact importance
    without a tensor of size samples × p × d, in about the time of one matrix product.

    f is applied after the sum over positions. The plain product of ``left.abs()`` and
    ``right.abs()`` would be an upper bound, not the importance; that of ``left.square()`` and
    ``right.square()`` would leave out the products of two positions. If samples have one position
    each, these products are the importance, and are what is computed. The factors' squares must
    then be in the range of the dtype of ``omega``.

    Args:
        omega: Ω [p, d], float32 (float64 beside float64 factors); written. Any strides, but
            it may not overlap itself, ``left`` or ``right``. Like positions, d may be several
            dimensions, [p, channels, height, width] say.
        left: [samples, positions, p], float32, float64, bfloat16 or float16, any strides.
        right: [samples, positions, d], in the dtype of ``left``, any strides. On CUDA, positions
            and d must each lie at a single stride in memory, as one dimension does.
        scale: a finite number ≥ 0.
        reduction: ``"abs"`` or ``"square"``.

    Products are summed in the dtype of ``omega``, in an order that does not depend on the number
    of threads, and squared in it. If there are no samples or no positions, nothing is written.

    Source: as for :func:`accumulate_importance_`.
    """
    _accumulate_outer(omega, left, right, scale, _is_square(reduction))


def accumulate_abs_matmul_(omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """The old name of :func:`accumulate_outer_` with the reduction ``"abs"``."""
    accumulate_outer_(omega, left, right, scale)


def penalty(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    *,
    omega_scales: Tensors = (),
) -> Tensor:
    r"""The penalty, twice differentiable in every argument.

    .. math:: \frac{\lambda}{2} \sum_i \Omega_i (\theta_i - \theta^*_i)^2

    Use ``torch.autograd``: the transforms of ``torch.func`` cannot differentiate operators.
    Terms are formed in float32 (float64 for float64 parameters) and summed in float64, in an
    order that does not depend on the number of threads.

    Returns:
        A 0-dim tensor: float64 if any parameter is, else float32. An empty list gives zero.

    Source: Aljundi et al., ECCV 2018, equation 3, whose λ is half of this one.
    """
    strength = _scalar("lambda_reg", lambda_reg)
    return torch.ops.mas_ext.penalty(
        _listed(params), _listed(anchors), _listed(omega), _listed(omega_scales), strength
    )


def penalty_and_grad(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    *,
    omega_scales: Tensors = (),
) -> tuple[Tensor, list[Tensor]]:
    r"""The penalty and its gradient in one pass over memory.

    .. math:: \frac{\partial}{\partial\theta_i} = \lambda\,\Omega_i(\theta_i - \theta^*_i)

    Returns:
        The penalty as in :func:`penalty`, and new tensors in the shapes and dtypes of ``params``.
    """
    strength = _scalar("lambda_reg", lambda_reg)
    value, grads = torch.ops.mas_ext.penalty_and_grad(
        _listed(params), _listed(anchors), _listed(omega), _listed(omega_scales), strength
    )
    return value, _listed(grads)


def add_penalty_grad_(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    grad_scale: Scalar | None = None,
    *,
    omega_scales: Tensors = (),
) -> Tensor:
    r"""Adds the penalty's gradient to ``grads`` in one pass, and returns the penalty.

    .. math:: g_i \leftarrow g_i + s\,\lambda\,\Omega_i(\theta_i - \theta^*_i)

    Args:
        grads: gradients in the dtype of ``params``; written.
        params, anchors, omega: θ, θ* and Ω.
        lambda_reg: λ ≥ 0.
        grad_scale: s, the factor by which the gradients are scaled (a loss scale); 1 if None.

    Returns:
        The penalty, not scaled by s, as in :func:`penalty`. Never waits for the device.
    """
    strength = _scalar("lambda_reg", lambda_reg)
    scale = None if grad_scale is None else _scalar("grad_scale", grad_scale)
    state = _listed(params), _listed(anchors), _listed(omega), _listed(omega_scales)
    return _add_penalty_grad(_listed(grads), *state, strength, scale)


def low_rank_penalty(
    a: Tensor,
    b: Tensor,
    omega: Tensor,
    lambda_reg: Scalar,
    scale: float = 1.0,
    *,
    omega_scales: Tensor | None = None,
) -> Tensor:
    r"""The penalty of a low-rank update of a weight, twice differentiable in every tensor.

    .. math:: \frac{\lambda}{2} \sum_{ij} \Omega_{ij} \Delta_{ij}^2,
        \qquad \Delta = \text{scale} \cdot B A

    This is the penalty of a LoRA adapter's merged weight, anchored at the weight without the
    adapter. Tiles of Δ are formed, weighted and consumed at once: nothing of the size of Ω is
    allocated. (On a GPU, sums of up to a sixteenth of its elements are. The gradient of a gradient
    is in plain PyTorch, and allocates.) Sums have an order that does not depend on the number of
    threads.

    If ``a`` or ``b`` requires a gradient, it is computed in the same pass, and the backward pass
    multiplies it by the incoming gradient. Use ``torch.autograd``: the transforms of ``torch.func``
    cannot differentiate operators.

    Args:
        a: A [rank, in], float32, float64, bfloat16 or float16, any strides.
        b: B [out, rank], in the dtype of ``a``, any strides.
        omega: Ω [out, in], any strides; may be stored in less where ``a`` is not float64.
        lambda_reg: λ.
        scale: a finite number ≥ 0.
        omega_scales: of Ω's codes if it is uint8, a tensor float32 [⌈elements/256⌉].

    For a weight that is stored transposed [in, out], pass ``omega.mT``.

    Returns:
        A 0-dim tensor: float64 if ``a`` is, else float32.

    Source: Aljundi et al., ECCV 2018, equation 3; Hu et al., ICLR 2022, for Δ.
    """
    strength = _scalar("lambda_reg", lambda_reg)
    with_grads = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    value, _, _ = torch.ops.mas_ext.low_rank_penalty(
        a, b, omega, omega_scales, strength, scale, with_grads
    )
    return value


def low_rank_penalty_grad_(
    grad_a: Tensor,
    grad_b: Tensor,
    a: Tensor,
    b: Tensor,
    omega: Tensor,
    lambda_reg: Scalar,
    scale: float = 1.0,
    *,
    omega_scales: Tensor | None = None,
) -> Tensor:
    r"""Adds the gradients of :func:`low_rank_penalty` to ``grad_a`` and ``grad_b``.

    .. math:: G_A \leftarrow G_A + \text{scale} \cdot B^\top (\lambda\,\Omega \circ \Delta) \qquad
        G_B \leftarrow G_B + \text{scale} \cdot (\lambda\,\Omega \circ \Delta) A^\top

    Args:
        grad_a, grad_b: gradients in the shapes and the dtype of ``a`` and ``b``, any strides;
            written.
        a, b, omega, scale, omega_scales: as for :func:`low_rank_penalty`.
        lambda_reg: λ ≥ 0.

    Gradients in 16 bits are rounded once: on the CPU they are summed in a float32 copy.

    Returns:
        The penalty as in :func:`low_rank_penalty`. Never waits for the device.
    """
    strength = _scalar("lambda_reg", lambda_reg)
    return _low_rank_penalty_grad(grad_a, grad_b, a, b, omega, omega_scales, strength, scale)


def proximal_step_(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    lr: Scalar,
    *,
    omega_scales: Tensors = (),
) -> Tensor:
    r"""Pulls the parameters towards their anchors by the penalty's proximal operator, in place.

    .. math:: \theta_i \leftarrow
        \frac{\theta_i + \eta\lambda\Omega_i\theta^*_i}{1 + \eta\lambda\Omega_i}

    This is the exact minimiser of penalty + ‖θ′ − θ‖²/2η. It is stable for every λ ≥ 0, whereas a
    gradient step with the same η diverges if ηλΩ > 2. Parameters with Ω = 0 keep their bits.

    Args:
        params: θ; written, even if they require gradients.
        anchors, omega: θ* and Ω.
        lambda_reg: λ ≥ 0.
        lr: η ≥ 0.

    Returns:
        The penalty after the step. Never waits for the device.
    """
    strength, rate = _scalar("lambda_reg", lambda_reg), _scalar("lr", lr)
    state = _listed(params), _listed(anchors), _listed(omega), _listed(omega_scales)
    return _proximal_step(*state, strength, rate)


def _step_scalars(
    lambda_reg: Scalar, lr: Scalar, grad_scale: Scalar | None, found_inf: Scalar | None
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor | None]]:
    optional = {"grad_scale": grad_scale, "found_inf": found_inf}
    strengths = _scalar("lambda_reg", lambda_reg), _scalar("lr", lr)
    return strengths, {k: None if v is None else _scalar(k, v) for k, v in optional.items()}


def check_mode(mode: str) -> None:
    """Raises ValueError unless the mode is ``"gradient"`` or ``"proximal"``."""
    if mode not in ("gradient", "proximal"):
        raise ValueError(f"mode: {mode!r} is unknown; use 'gradient' or 'proximal'")


def _is_proximal(mode: str) -> bool:
    check_mode(mode)
    return mode == "proximal"


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    lr: Scalar,
    *,
    omega_scales: Tensors = (),
    mode: str = "gradient",
    momentum_buffers: Tensors = (),
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> Tensor:
    r"""A step of SGD that includes the penalty, in one pass, and returns the penalty.

    .. math::
        d_i &= \pm g_i / s + \lambda\,\Omega_i(\theta_i - \theta^*_i) + w\,\theta_i \\
        b_i &\leftarrow \mu\,b_i + (1 - \tau)\,d_i \\
        \theta_i &\leftarrow \theta_i - \eta\,b_i

    (Without momentum the last line is :math:`\theta_i - \eta\,d_i`, with Nesterov momentum
    :math:`\theta_i - \eta(d_i + \mu b_i)`.) With ``mode="proximal"`` the penalty is not in d.
    Instead the step ends with :math:`\theta_i \leftarrow (\theta_i + \eta\lambda\Omega_i\theta^*_i)
    / (1 + \eta\lambda\Omega_i)`. All of it is computed in the accumulation dtype and rounded once.

    It replaces :func:`add_penalty_grad_` followed by ``torch.optim.SGD(fused=True)``, or the latter
    followed by :func:`proximal_step_`. It moves 20 bytes per float32 parameter (28 with momentum);
    the two separate calls of gradient mode move 32 (40).

    Args:
        params: θ; written, even if they require gradients.
        grads: g, in the dtype of ``params``; not written.
        anchors, omega: θ* and Ω.
        lambda_reg: λ ≥ 0.
        lr: η ≥ 0.
        mode: ``"gradient"`` or ``"proximal"``.
        momentum_buffers: b, in the dtype of ``params``, zeros before the first step; written.
            Leave it out if ``momentum`` is 0.
        momentum, dampening, weight_decay: μ, τ and w ≥ 0. (In torch, the first step ignores τ.)
        nesterov: whether to use Nesterov momentum; needs a momentum and no dampening.
        maximize: uses −g, to maximize the loss. The penalty is still minimized.
        grad_scale: s > 0, the factor by which the gradients are scaled (a loss scale); 1 if None.
        found_inf: if it is not 0, nothing is written and the penalty is that of the unchanged θ.

    Returns:
        The penalty before the step, or for ``"proximal"`` after it. Never waits for the device.
    """
    strengths, optional = _step_scalars(lambda_reg, lr, grad_scale, found_inf)
    return _sgd_step(
        _listed(params),
        _listed(grads),
        _listed(momentum_buffers),
        _listed(anchors),
        _listed(omega),
        _listed(omega_scales),
        *strengths,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        proximal=_is_proximal(mode),
        **optional,
    )


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Scalar,
    lr: Scalar,
    *,
    omega_scales: Tensors = (),
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensor,
    mode: str = "gradient",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
) -> Tensor:
    r"""A step of AdamW (or Adam) that includes the penalty, in one pass, and returns the penalty.

    .. math::
        d_i &= \pm g_i / s + \lambda\,\Omega_i(\theta_i - \theta^*_i) \\
        m_i &\leftarrow \beta_1 m_i + (1 - \beta_1)\,d_i \qquad
        v_i \leftarrow \beta_2 v_i + (1 - \beta_2)\,d_i^2 \\
        \theta_i &\leftarrow (1 - \eta w)\,\theta_i
            - \eta\,\frac{m_i / (1-\beta_1^t)}{\sqrt{v_i / (1-\beta_2^t)} + \epsilon}

    With ``decoupled=False`` the weight decay is Adam's: :math:`w\,\theta_i` is added to d, and θ is
    not shrunk. With ``mode="proximal"`` the penalty is not in d. Instead the
    step ends with :math:`\theta_i \leftarrow (\theta_i + \eta\lambda\Omega_i\theta^*_i) /
    (1 + \eta\lambda\Omega_i)`. All of it is computed in the accumulation dtype and rounded once.

    It replaces :func:`add_penalty_grad_` followed by ``torch.optim.AdamW(fused=True)``, or the
    latter followed by :func:`proximal_step_`. It moves 36 bytes per float32 parameter; the two
    separate calls of gradient mode move 48.

    Args:
        params: θ; written, even if they require gradients.
        grads: g, in the dtype of ``params``; not written.
        anchors, omega: θ* and Ω.
        lambda_reg: λ ≥ 0.
        lr: η ≥ 0.
        exp_avgs, exp_avg_sqs: m and v, in the dtype of ``params``, zeros at first; written.
        steps: the number of steps each parameter has taken before this one, t − 1: a float32 or
            float64 tensor [number of parameters] on their device; not written.
        mode: ``"gradient"`` or ``"proximal"``.
        betas: β₁ and β₂, both in [0, 1).
        eps, weight_decay: ε and w ≥ 0.
        decoupled: True for AdamW's weight decay, False for Adam's.
        maximize: uses −g, to maximize the loss. The penalty is still minimized.
        grad_scale: s > 0, the factor by which the gradients are scaled (a loss scale); 1 if None.
        found_inf: if it is not 0, nothing is written and the penalty is that of the unchanged θ.

    Returns:
        The penalty before the step, or for ``"proximal"`` after it. Never waits for the device.
    """
    strengths, optional = _step_scalars(lambda_reg, lr, grad_scale, found_inf)
    return _adamw_step(
        _listed(params),
        _listed(grads),
        _listed(exp_avgs),
        _listed(exp_avg_sqs),
        steps,
        _listed(anchors),
        _listed(omega),
        _listed(omega_scales),
        *strengths,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        proximal=_is_proximal(mode),
        **optional,
    )
