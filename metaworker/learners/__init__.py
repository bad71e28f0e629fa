"""Learners: one algorithm per file under the interface in ``base``; ``build_learner`` makes the configured one."""

from __future__ import annotations

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.config.sections import BatchNorm
from cluster.errors import ConfigError
from metaworker.learners.base import Learner
from metaworker.learners.embedding import EmbeddingLearner
from metaworker.learners.maml import MAML
from metaworker.learners.objective import CLASSIFICATION, REGRESSION
from metaworker.learners.protonet import Prototypes
from metaworker.learners.reptile import Reptile
from metaworker.models import build_backbone


def default_batch_norm(config: RunConfig) -> BatchNorm | None:
    """The batch-norm mode that the run was configured with; ``None`` for nets without batch-norm."""
    return None if isinstance(config.model, sections.MLP) else config.model.batch_norm


def check_way(config: RunConfig, way: int, key: str) -> None:
    """Refuse to evaluate with a number of classes that the learner cannot tell apart.

    Args:
        config: the run's configuration.
        way: classes of an evaluation's episode.
        key: where that was said.

    Raises:
        ConfigError: the learner's head has one output a class, and ``way`` is not training's.
    """
    if not config.learner.any_way and way != config.episode.way:
        raise ConfigError(
            f"{key} must be {config.episode.way}, as in training, for learner {config.learner.type}, whose head has "
            f"one output a class, got {way}"
        )


def build_learner(
    config: RunConfig, sample_shape: tuple[int, ...], way: int | None = None, batch_norm: BatchNorm | None = None
) -> Learner:
    """The learner that ``config`` describes, for samples of ``sample_shape``.

    Args:
        config: the run's configuration.
        sample_shape: shape of one input sample.
        way: classes of an episode, where an evaluation's differ from training's (`LearnerSection.any_way`).
        batch_norm: batch-norm mode of an evaluation, where it differs from training's.
    """
    way = config.episode.way if way is None else way
    mode = batch_norm or default_batch_norm(config) or "transductive"
    objective = REGRESSION if config.regression else CLASSIFICATION
    outputs = 1 if config.regression else way
    match config.learner:
        case learners.MAML() as c:
            backbone = build_backbone(config.model, sample_shape, outputs)
            return MAML(backbone, objective, mode, c.inner_lr, c.inner_steps, c.eval_steps, c.first_order)
        case learners.Reptile() as c:
            backbone = build_backbone(config.model, sample_shape, outputs)
            adam = c.inner_optimizer == "adam"
            return Reptile(
                backbone,
                objective,
                mode,
                c.inner_lr,
                c.inner_steps,
                c.eval_steps,
                c.inner_batch,
                c.eval_inner_batch,
                adam,
                config.seed,
            )
        case learners.ProtoNet():
            return EmbeddingLearner(
                build_backbone(config.model, sample_shape, None), Prototypes(way), mode, config.seed
            )
