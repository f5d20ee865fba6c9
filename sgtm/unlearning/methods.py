"""Methods of post-hoc unlearning: a loss for each, from the model, a frozen copy of it as it was, and two texts.

Each function is f(model, reference, forget, retain, *, its options) -> `Loss`. What a method does not read is not
touched and may be None; `METHODS` holds what it reads, its number of steps and its learning rate. The
options are the keywords of the function, with the paper's values.

A sequence of the losses below is a packed one, of `model.context` tokens. The papers' are answers of a few dozen tokens
(TOFU) or chunks of a text (MUSE): `beta` acts on the sum over a sequence in `npo`, on the mean in `simnpo`.

Learning rates are shares of the run's own peak (`optimizer.lr`): those of the papers go with models of billions of
parameters and would barely move a small one. Shares are the paper's rate over the peak rate that its model was
pretrained with: 1e-5 for Llama-2 7B (3e-4, arXiv 2307.09288) is a thirtieth, and 5e-5 for GPT-Neo 125M (6e-4, as
GPT-3's of that size, arXiv 2005.14165 table 2.1) a twelfth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm.model.transformer import Transformer
from sgtm.unlearning.misdirection import rmu, steered
from sgtm.unlearning.text import Loss, Text, log_likelihood, mean_loss

TOFU_DIVISOR, TOFU_STEPS = 30, 125
"""1e-5 on Llama-2 7B, and 10 epochs of the 400 texts of `forget10` in batches of 32 (arXiv 2401.06121)."""


def gradient_ascent(model: Transformer, reference: None, forget: Text, retain: None) -> Loss:
    """Minus the loss on forget text (Jang et al. 2022, arXiv 2210.01504): -mean over targets of -log p.

    The paper's rate is 5e-5, constant, in batches of 32 sequences, until the texts are no longer extracted.
    """
    loss = mean_loss(model, forget)
    return Loss(-loss, {"loss/forget": loss.detach()})


def grad_diff(model: Transformer, reference: None, forget: Text, retain: Text, *, retain_weight: float = 1.0) -> Loss:
    """Ascent on forget text and descent on retain text (Liu et al. 2022, arXiv 2203.12817; as in TOFU, arXiv
    2401.06121): loss(retain) - loss(forget), means over targets.
    """
    ascent, descent = mean_loss(model, forget), mean_loss(model, retain)
    return Loss(retain_weight * descent - ascent, {"loss/forget": ascent.detach(), "loss/retain": descent.detach()})


def npo(
    model: Transformer,
    reference: Transformer,
    forget: Text,
    retain: Text,
    *,
    beta: float = 0.1,
    retain_weight: float = 1.0,
) -> Loss:
    """Negative preference optimisation with a retain term (Zhang et al. 2024, arXiv 2404.05868, NPO+RT):

        2 / beta * mean over forget sequences of log(1 + (p / p_ref)^beta)  +  retain_weight * loss(retain)

    p, p_ref: probability of all targets of a sequence under the model and the reference. beta 0.1 and rate 1e-5 are
    the paper's for TOFU. At the reference the first term is 2 / beta * log 2; as beta tends to 0 its gradient tends to
    that of the mean of log p, which is gradient ascent on the sequences' sums.
    """
    likelihood = log_likelihood(model, forget)
    with torch.no_grad():
        before = log_likelihood(reference, forget)
    preference = _preference(beta * (likelihood - before), forget) * (2 / beta)
    return _with_retain(model, forget, retain, likelihood, preference, retain_weight)


def simnpo(
    model: Transformer,
    reference: None,
    forget: Text,
    retain: Text,
    *,
    beta: float = 4.5,
    gamma: float = 0.0,
    forget_weight: float = 0.125,
    retain_weight: float = 1.0,
) -> Loss:
    """NPO without a reference, normalised by length (Fan et al. 2024, arXiv 2410.07163):

        forget_weight * -2 / beta * mean over forget sequences of log sigmoid(-beta / n * log p - gamma)
            + retain_weight * loss(retain)

    n: targets of the sequence. The gradient of a sequence has the weight sigmoid(gamma + beta / n * log p): with these
    values next to nothing where the loss is several nats, as of a model that was only pretrained. beta 4.5, gamma 0 and
    the weights 0.125 and 1 are those of the authors' code for `forget10` of TOFU, at rate 1e-5.
    """
    likelihood = log_likelihood(model, forget)
    counts = forget.chosen.sum(1).clamp(min=1)
    preference = _preference(beta * likelihood / counts + gamma, forget) * (2 / beta)
    return _with_retain(model, forget, retain, likelihood, forget_weight * preference, retain_weight)


def finetune(model: Transformer, reference: None, forget: None, retain: Text) -> Loss:
    """Loss on retain text alone (a baseline of TOFU, arXiv 2401.06121, and of most others)."""
    loss = mean_loss(model, retain)
    return Loss(loss, {"loss/retain": loss.detach()})


def _preference(margins: torch.Tensor, text: Text) -> torch.Tensor:
    """Mean of log(1 + exp(margin)) over the sequences that have a target; margins: [B]."""
    return F.softplus(margins)[text.chosen.any(1)].mean()


def _with_retain(
    model: Transformer, forget: Text, retain: Text, likelihood: torch.Tensor, preference: torch.Tensor, weight: float
) -> Loss:
    descent = mean_loss(model, retain)
    forgotten = -likelihood.detach().sum() / forget.chosen.sum()
    return Loss(preference + weight * descent, {"loss/forget": forgotten, "loss/retain": descent.detach()})


class Method(NamedTuple):
    """What the loop needs of a method.

    divisor  the learning rate is the run's peak over this
    learns   (model, options) -> names of the parameters that it changes; None: all
    """

    loss: Callable[..., Loss]
    steps: int
    divisor: float
    forget: bool = True
    retain: bool = True
    reference: bool = False
    learns: Callable[[Transformer, dict], set[str]] | None = None

    @property
    def options(self) -> dict[str, float | None]:
        """Defaults by name."""
        return dict(self.loss.__kwdefaults__ or {})


METHODS = {
    "gradient_ascent": Method(gradient_ascent, TOFU_STEPS, 12, retain=False),
    "grad_diff": Method(grad_diff, TOFU_STEPS, TOFU_DIVISOR),
    "npo": Method(npo, TOFU_STEPS, TOFU_DIVISOR, reference=True),
    "simnpo": Method(simnpo, TOFU_STEPS, TOFU_DIVISOR),
    "rmu": Method(rmu, 150, 6, reference=True, learns=steered),
    "finetune": Method(finetune, TOFU_STEPS, TOFU_DIVISOR, forget=False),
}
