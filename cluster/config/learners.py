"""Configuration sections of the meta-learning algorithms, one class each.

Field docstrings are the ``--help`` text: meaning and unit. This module imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cluster.config.base import Section


class LearnerSection(Section):
    """What is said of every algorithm, besides its fields."""

    regresses: ClassVar[bool] = False
    """Whether it takes regression episodes too."""
    any_way: ClassVar[bool] = True
    """Whether its parameters are the same for any number of classes, so that evaluations may have another one."""


# ------------------------------------------------------------------------------------------------------ gradient-based


class MAML(LearnerSection):
    """Model-agnostic meta-learning (arXiv 1703.03400), second or first order."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["maml"] = "maml"
    inner_lr: float = Field(default=0.4, gt=0)
    """Inner step size α."""
    inner_steps: int = Field(default=1, ge=1)
    """Adaptation steps in training."""
    eval_steps: int = Field(default=3, ge=1)
    """Adaptation steps in evaluation."""
    first_order: bool = False
    """Whether second derivatives are dropped (first-order MAML)."""


class Reptile(LearnerSection):
    """Reptile (arXiv 1803.02999): the meta-gradient is θ − φ after inner Adam or SGD steps."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["reptile"] = "reptile"
    inner_lr: float = Field(default=1e-3, gt=0)
    """Inner step size."""
    inner_steps: int = Field(default=5, ge=1)
    """Inner steps in training."""
    eval_steps: int = Field(default=50, ge=1)
    """Inner steps in evaluation."""
    inner_batch: int = Field(default=10, ge=1)
    """Samples an inner step in training, drawn without replacement in passes over support and query together."""
    eval_inner_batch: int = Field(default=5, ge=1)
    """Samples an inner step in evaluation, drawn from the support set."""
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    """Inner optimizer; Adam is used with β1 = 0, as in the paper."""


# -------------------------------------------------------------------------------------------------------- metric-based


class ProtoNet(LearnerSection):
    """Prototypical Networks (arXiv 1703.05175): softmax over negative squared distances to class means."""

    type: Literal["protonet"] = "protonet"


Learner = Annotated[
    MAML | Reptile | ProtoNet,
    Field(discriminator="type"),
]
