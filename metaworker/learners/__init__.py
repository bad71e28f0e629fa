"""Learners: one algorithm per file under the interface in ``base``; ``build_learner`` makes the configured one."""

from __future__ import annotations

from cluster.config import learners, sections
from cluster.config.run import RunConfig
from cluster.config.sections import BatchNorm
from cluster.errors import ConfigError
from metaworker.learners.anil import ANIL
from metaworker.learners.attention import attention_head
from metaworker.learners.base import Learner
from metaworker.learners.embedding import EmbeddingLearner, Head
from metaworker.learners.episodic import EpisodicMemory
from metaworker.learners.gradient_based import Network
from metaworker.learners.imaml import IMAML
from metaworker.learners.lstm_optimizer import CellRule, HiddenRule, LSTMOptimizer
from metaworker.learners.maml import MAML
from metaworker.learners.mamlpp import MAMLpp
from metaworker.learners.mann import MemoryAugmented
from metaworker.learners.matching import CosineAttention, FullContext
from metaworker.learners.memory import Memory
from metaworker.learners.metadata_maml import MetadataMAML
from metaworker.learners.metasgd import MetaSGD
from metaworker.learners.objective import CLASSIFICATION, REGRESSION
from metaworker.learners.protonet import Prototypes
from metaworker.learners.relation import RelationModule, map_to_compare
from metaworker.learners.relational import RecurrentRelational
from metaworker.learners.reptile import Reptile
from metaworker.learners.ridge import RidgeRegression
from metaworker.learners.siamese import WeightedL1
from metaworker.learners.snail import SNAIL
from metaworker.learners.triplet import NearestNeighbour
from metaworker.models import build_backbone
from metaworker.models.base import Backbone


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

    network = Network(build_backbone(config.model, sample_shape, outputs), objective, mode)
    encoder = build_backbone(config.model, sample_shape, None)
    head = _head(config, encoder, way)
    if head is not None:
        return EmbeddingLearner(encoder, head, mode, config.seed)
    match config.learner:
        case learners.MAML() as c:
            return MAML(network, c.inner_lr, c.inner_steps, c.eval_steps, c.first_order)
        case learners.ANIL() as c:
            return ANIL(network, c.inner_lr, c.inner_steps, c.eval_steps, c.first_order)
        case learners.MetaSGD() as c:
            return MetaSGD(network, c.inner_lr, c.inner_steps, c.eval_steps)
        case learners.MAMLpp() as c:
            return MAMLpp(network, c.inner_lr, c.inner_steps, c.eval_steps, c.anneal_versions, c.first_order_versions)
        case learners.IMAML() as c:
            inner = c.inner_lr, c.inner_steps, c.eval_steps, c.proximal_strength
            return IMAML(network, *inner, c.cg_steps, c.cg_damping)
        case learners.LSTMOptimizer() as c:
            rule = (CellRule if c.form == "cell" else HiddenRule)(c.hidden, c.initial_step)
            return LSTMOptimizer(network, rule, c.inner_steps, c.eval_steps, c.first_order)
        case learners.Reptile() as c:
            steps, batches = (c.inner_steps, c.eval_steps), (c.inner_batch, c.eval_inner_batch)
            return Reptile(network, c.inner_lr, *steps, *batches, c.inner_optimizer == "adam", config.seed)
        case learners.MetadataMAML() as c:
            return MetadataMAML(network, c.columns, c.width, c.inner_lr, c.inner_steps, c.eval_steps)
        case section:
            raise ConfigError(f"learner.type {section.type} is registered but not built: add a case for it")


def _head(config: RunConfig, encoder: Backbone, way: int) -> Head | None:
    """The head of a learner that embeds and compares; ``None`` for other learners."""
    size = encoder.output_size
    match config.learner:
        case learners.ProtoNet():
            return Prototypes(way)
        case learners.Matching() as c:
            context = FullContext(size, c.reads) if c.full_context else None
            return CosineAttention(way, c.scale, context)
        case learners.Siamese() as c:
            return WeightedL1(way, size, c.units)
        case learners.Triplet() as c:
            return NearestNeighbour(way, c.margin, c.normalise, c.mining)
        case learners.Relation() as c:
            return RelationModule(way, map_to_compare(config.model, encoder), c.channels)
        case learners.EpisodicMemory() as c:
            return EpisodicMemory(way, size, c.columns, c.capacity, c.key_width, c.use_bank)
        case learners.Ridge() as c:
            return RidgeRegression(way, c.regularisation, c.scale)
        case learners.AttentionLearner() as c:
            return attention_head(c, encoder, way)
        case learners.SNAIL() as c:
            return SNAIL(way, size, config.episode.way * config.episode.shot + 1, c.filters)
        case learners.InternalMemory() as c:
            return Memory(way, size, c.slots, c.width, c.heads, c.init == "random", c.ablate, c.carry)
        case learners.MANN() as c:
            memory = c.controller, c.slots, c.width, c.reads, c.usage_decay, c.strength
            return MemoryAugmented(way, size, *memory)
        case learners.Relational() as c:
            return RecurrentRelational(way, size, c.hidden, c.message_steps)
        case _:
            return None
