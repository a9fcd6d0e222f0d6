"""Formulas: the loss as a function of parameters and tokens, and the best of both for a compute budget.

    loss(N, D)     = E + A / N ** alpha + B / D ** beta                      (Hoffmann et al. 2022, equation 2)
    compute(N, D)  = factor * N ** power * D                                 (6 N D by default)
    with repeats   : N and D are replaced by what they are worth             (after Muennighoff et al. 2023, equations 5 to 7)

>>> law = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
>>> N, D = law.optimum(5.76e23)
>>> f"{N:.3g} parameters, {D:.3g} tokens, loss {law.loss(N, D):.3f}"
'3.22e+10 parameters, 2.98e+12 tokens, loss 1.931'
>>> f"{RepeatLaw(law, R_D=15.4, R_N=5.3).worth_of_tokens(4e9, 1e9) / 1e9:.4f}"
'3.7259'
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from firth.fields import PositiveFloat, Validated

FloatArray = np.ndarray


@dataclass(frozen=True)
class ComputeRule(Validated):
    """FLOPs of a training run: factor * N ** power * D.

    A model of words has a large head and, at small widths, costly attention, so counted FLOPs are not 6 N D exactly.

    Args:
        factor: FLOPs per parameter and token.
        power: Exponent of the parameters.
    """

    factor: PositiveFloat = 6.0
    power: PositiveFloat = 1.0

    def flops(self, N: ArrayLike, D: ArrayLike) -> FloatArray:
        """Return the FLOPs of training N parameters on D tokens."""
        return self.factor * np.asarray(N, float) ** self.power * np.asarray(D, float)

    def tokens(self, N: ArrayLike, C: ArrayLike) -> FloatArray:
        """Return the tokens that N parameters read for C FLOPs."""
        return np.asarray(C, float) / (self.factor * np.asarray(N, float) ** self.power)


SIX_N_D = ComputeRule()


@dataclass(frozen=True)
class LossLaw(Validated):
    """Loss by parameters N and tokens D: E + A / N ** alpha + B / D ** beta.

    Args:
        E: Loss of an infinite model on infinite text.
        A: Factor of the parameters' term.
        B: Factor of the tokens' term.
        alpha: Exponent of the parameters.
        beta: Exponent of the tokens.
    """

    E: PositiveFloat
    A: PositiveFloat
    B: PositiveFloat
    alpha: PositiveFloat
    beta: PositiveFloat

    def loss(self, N: ArrayLike, D: ArrayLike) -> FloatArray:
        """Return the loss of N parameters after D tokens."""
        return self.E + self.A / np.asarray(N, float) ** self.alpha + self.B / np.asarray(D, float) ** self.beta

    def exponent(self, rule: ComputeRule = SIX_N_D) -> float:
        """Return a, where the best N grows with C ** a: beta / (alpha + beta) for 6 N D."""
        return self.beta / (self.alpha + rule.power * self.beta)

    def optimum(self, C: float, rule: ComputeRule = SIX_N_D) -> tuple[float, float]:
        """Return the parameters and the tokens of the least loss for C FLOPs.

        It is where the derivative of the loss along constant C is 0: alpha A / N ** alpha = power beta B / D ** beta.
        """
        ratio = self.alpha * self.A / (rule.power * self.beta * self.B)
        total = self.alpha + rule.power * self.beta
        N = ratio ** (1 / total) * (C / rule.factor) ** (self.beta / total)
        return N, float(rule.tokens(N, C))

    def parameters_for(self, D: ArrayLike, rule: ComputeRule = SIX_N_D) -> FloatArray:
        """Return the parameters for which D tokens are the optimum of their budget."""
        ratio = self.alpha * self.A / (rule.power * self.beta * self.B)
        return (ratio * np.asarray(D, float) ** self.beta) ** (1 / self.alpha)


@dataclass(frozen=True)
class RepeatLaw(Validated):
    """Loss where the text is read several times: repeated tokens and excess parameters are worth less than new ones.

    R repeats of U unique tokens are worth U * R_D * (1 - exp(-R / R_D)) new ones. Parameters beyond the N_U for which U tokens are
    the optimum are worth less in the same way: x * N_U of them are worth N_U * (R_N / s) * (1 - exp(-s * x / R_N)), where
    s = 1 - exp(-R / R_D) is what a repeated token has lost of its worth. In the paper s is 1, also for text that is read once, so
    that its loss jumps away from the law of new tokens after the first epoch. With s nothing is lost at R = 0, and the two agree
    for many epochs.

    Args:
        law: The law of new tokens.
        R_D: Repeats after which another one is worth 1 / e of new text.
        R_N: The same for parameters.
    """

    law: LossLaw
    R_D: PositiveFloat
    R_N: PositiveFloat

    def worth_of_tokens(self, D: ArrayLike, unique: ArrayLike) -> FloatArray:
        """Return the new tokens that D tokens from `unique` ones are worth."""
        D, unique = np.asarray(D, float), np.asarray(unique, float)
        return _worth(D, np.minimum(D, unique), self.R_D)

    def worth_of_parameters(
        self, N: ArrayLike, D: ArrayLike, unique: ArrayLike, rule: ComputeRule = SIX_N_D
    ) -> FloatArray:
        """Return the parameters that N are worth after D tokens from `unique` ones."""
        N, D, unique = np.asarray(N, float), np.asarray(D, float), np.asarray(unique, float)
        lost = -np.expm1(-np.maximum(0.0, D / unique - 1) / self.R_D)
        best = np.minimum(N, self.law.parameters_for(np.minimum(D, unique), rule))
        return _worth(N, best, self.R_N / np.maximum(lost, 1e-12))

    def loss(self, N: ArrayLike, D: ArrayLike, unique: ArrayLike, rule: ComputeRule = SIX_N_D) -> FloatArray:
        """Return the loss of N parameters after D tokens from `unique` ones."""
        return self.law.loss(self.worth_of_parameters(N, D, unique, rule), self.worth_of_tokens(D, unique))

    def epochs_at_worth(self, share: float) -> float:
        """Return the epochs after which a repeated token is worth `share` of a new one: 1 + R_D ln(1 / share)."""
        return 1 + self.R_D * float(np.log(1 / share))


def _worth(total: FloatArray, unique: FloatArray, decay: ArrayLike) -> FloatArray:
    """Return unique + unique * decay * (1 - exp(-repeats / decay))."""
    decay = np.asarray(decay, float)
    return unique - unique * decay * np.expm1(-(total / unique - 1) / decay)
