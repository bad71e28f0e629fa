"""Learners: one algorithm per file under the interface in ``base``; ``build_learner`` makes the configured one."""

from __future__ import annotations

from cluster.config import sections
from cluster.config.run import RunConfig
from cluster.messages import BatchNorm
from metaworker.learners.base import Learner
from metaworker.learners.maml import MAML
from metaworker.learners.objective import CLASSIFICATION, REGRESSION
from metaworker.learners.protonet import ProtoNet
from metaworker.learners.reptile import Reptile
from metaworker.models import build_backbone


def default_batch_norm(config: RunConfig) -> BatchNorm:
    """The batch-norm mode that the run was configured with; ``transductive`` for nets without batch-norm."""
    return "transductive" if isinstance(config.model, sections.MLP) else config.model.batch_norm


def build_learner(
    config: RunConfig, sample_shape: tuple[int, ...], way: int | None = None, batch_norm: BatchNorm | None = None
) -> Learner:
    """The learner that ``config`` describes, for samples of ``sample_shape``.

    Args:
        config: the run's configuration.
        sample_shape: shape of one input sample.
        way: classes of an episode, where an evaluation's differ from training's (ProtoNet's parameters do not
            depend on it).
        batch_norm: batch-norm mode of an evaluation, where it differs from training's.
    """
    way = config.episode.way if way is None else way
    mode = batch_norm or default_batch_norm(config)
    objective = REGRESSION if config.regression else CLASSIFICATION
    outputs = 1 if config.regression else way
    match config.learner:
        case sections.MAML() as c:
            backbone = build_backbone(config.model, sample_shape, outputs)
            return MAML(backbone, objective, mode, c.inner_lr, c.inner_steps, c.eval_steps, c.first_order)
        case sections.Reptile() as c:
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
        case sections.ProtoNet():
            return ProtoNet(build_backbone(config.model, sample_shape, None), objective, mode, way)
