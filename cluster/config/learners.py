"""Configuration sections of the meta-learning algorithms, one class each.

Field docstrings are the ``--help`` text: meaning and unit. This module imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

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


class ANIL(LearnerSection):
    """ANIL, almost no inner loop (arXiv 1909.09157): MAML that adapts the last layer alone."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["anil"] = "anil"
    inner_lr: float = Field(default=1.0, gt=0)
    """Inner step size α, of the head; larger than where every layer adapts."""
    inner_steps: int = Field(default=5, ge=1)
    """Adaptation steps in training."""
    eval_steps: int = Field(default=10, ge=1)
    """Adaptation steps in evaluation."""
    first_order: bool = False
    """Whether the steps of the head are constants to the outer loop."""


class MetaSGD(LearnerSection):
    """Meta-SGD (arXiv 1707.09835): MAML that learns a step size for each element of each parameter."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["metasgd"] = "metasgd"
    inner_lr: float = Field(default=0.4, gt=0)
    """Inner step size of every element to start with."""
    inner_steps: int = Field(default=1, ge=1)
    """Adaptation steps in training, all with the same step sizes."""
    eval_steps: int = Field(default=3, ge=1)
    """Adaptation steps in evaluation."""


class MAMLpp(LearnerSection):
    """MAML++ (arXiv 1810.09502): MAML with step sizes and batch-norm learned per step, and a loss at every step."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["mamlpp"] = "mamlpp"
    inner_lr: float = Field(default=0.2, gt=0)
    """Inner step size of every layer and step to start with."""
    inner_steps: int = Field(default=3, ge=1)
    """Adaptation steps in training."""
    eval_steps: int = Field(default=3, ge=1)
    """Adaptation steps in evaluation; those beyond inner_steps repeat the last one's step sizes and batch-norm."""
    anneal_versions: int = Field(default=500, ge=0)
    """Versions within which the earlier steps' query losses lose their weight; 0: the last step's alone counts."""
    first_order_versions: int = Field(default=0, ge=0)
    """Versions at the start that drop second derivatives."""


class IMAML(LearnerSection):
    """Implicit MAML (arXiv 1909.04630): memory does not grow with the number of inner steps."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["imaml"] = "imaml"
    inner_lr: float = Field(default=0.02, gt=0)
    """Step size of gradient descent on the inner problem; pictures take 0.1 to 0.3, regression much less."""
    inner_steps: int = Field(default=16, ge=1)
    """Steps on the inner problem in training."""
    eval_steps: int = Field(default=16, ge=1)
    """Steps on the inner problem in evaluation."""
    proximal_strength: float = Field(default=0.5, gt=0)
    """λ of the inner problem's term λ/2 ‖φ − θ‖²: larger ones hold the task's parameters closer to the shared ones."""
    cg_steps: int = Field(default=5, ge=1)
    """Conjugate-gradient iterations for the meta-gradient, each a product of the Hessian with a vector."""
    cg_damping: float = Field(default=0.0, ge=0)
    """Added to λ in the linear system alone, against negative curvature; the paper has none."""


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


class LSTMOptimizer(LearnerSection):
    """An LSTM shared by all coordinates, learned as the inner optimizer (Ravi & Larochelle, ICLR 2017)."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["lstm"] = "lstm"
    form: Literal["cell", "hidden"] = "cell"
    """What the learner's parameters are: cell, the LSTM's cell state, with learned forget and input gates; hidden,
    moved by the LSTM's output times a learned step size (arXiv 1606.04474)."""
    hidden: int = Field(default=20, ge=1)
    """Hidden units of the LSTM that sees the gradients."""
    initial_step: float = Field(default=0.1, gt=0, lt=1)
    """Step size of the gradient descent that the rule is before training: the input gates, or the learned step size."""
    inner_steps: int = Field(default=5, ge=1)
    """Adaptation steps in training."""
    eval_steps: int = Field(default=5, ge=1)
    """Adaptation steps in evaluation."""
    first_order: bool = True
    """Whether the gradients and losses that the LSTM sees are constants, as in the papers."""


# -------------------------------------------------------------------------------------------------------- metric-based


class ProtoNet(LearnerSection):
    """Prototypical Networks (arXiv 1703.05175): softmax over negative squared distances to class means."""

    type: Literal["protonet"] = "protonet"


class Matching(LearnerSection):
    """Matching Networks (arXiv 1606.04080): cosine attention over the support set votes for the labels."""

    type: Literal["matching"] = "matching"
    scale: float = Field(default=20.0, gt=0)
    """Factor of the cosines before the softmax; the paper's is 1."""
    full_context: bool = False
    """Whether LSTMs embed support and query samples in the context of the whole support set, in its order."""
    reads: int = Field(default=5, ge=1)
    """Attention steps over the support set that embed a query, with full_context."""


class Siamese(LearnerSection):
    """Siamese networks (Koch et al. 2015): whether two samples are of one class, by a weighted L1 distance."""

    type: Literal["siamese"] = "siamese"
    units: int = Field(default=256, ge=1)
    """Sigmoid features that are compared; the paper has 4096."""


class Triplet(LearnerSection):
    """Triplet loss (arXiv 1503.03832), queries as anchors; the nearest support sample decides."""

    type: Literal["triplet"] = "triplet"
    margin: float = Field(default=10.0, gt=0)
    """By which a negative must be farther than a positive, squared distance; 0.1 to 0.5 goes with normalise."""
    normalise: bool = False
    """Whether embeddings are scaled to length 1."""
    mining: Literal["hard", "all"] = "hard"
    """Triplets in the loss: the hardest positive and negative of each query, or all that violate the margin."""


class Relation(LearnerSection):
    """Relation Networks (arXiv 1711.06025): a convolutional net scores a query's map beside each class's."""

    type: Literal["relation"] = "relation"
    channels: int = Field(default=64, ge=1)
    """Channels of the two convolutions that compare maps."""


class MetadataMAML(LearnerSection):
    """MAML from an initialisation that the task's metadata modulates; without metadata it is MAML."""

    regresses: ClassVar[bool] = True
    any_way: ClassVar[bool] = False

    type: Literal["metadata"] = "metadata"
    columns: tuple[str, ...] = ("amplitude", "phase", "script", "category", "alphabet")
    """Metadata columns that are read; those that the data lacks are left out of account."""
    width: int = Field(default=64, ge=1)
    """Width of the task embedding."""
    inner_lr: float = Field(default=0.4, gt=0)
    """Inner step size α."""
    inner_steps: int = Field(default=1, ge=1)
    """Adaptation steps in training."""
    eval_steps: int = Field(default=3, ge=1)
    """Adaptation steps in evaluation."""


class EpisodicMemory(LearnerSection):
    """Prototypical Networks with an external memory: past tasks, looked up by metadata, modulate the embeddings."""

    type: Literal["episodic"] = "episodic"
    columns: tuple[str, ...] = ("script", "category", "alphabet")
    """Metadata columns that tasks are looked up by; those that the data lacks are left out of account."""
    capacity: int = Field(default=512, ge=1)
    """Past tasks that are kept; a new one takes the place of the oldest."""
    key_width: int = Field(default=16, ge=1)
    """Width in which tasks' metadata is compared."""
    use_bank: bool = True
    """Whether the memory is read; without it this is a Prototypical Network."""


class Ridge(LearnerSection):
    """R2D2 (arXiv 1805.08136): ridge regression on the embeddings, solved in closed form."""

    type: Literal["ridge"] = "ridge"
    regularisation: float = Field(default=1.0, gt=0)
    """Ridge penalty λ before training, which learns it."""
    scale: float = Field(default=10.0, gt=0)
    """Factor α of the regressed labels as logits before training, which learns it."""


# ----------------------------------------------------------------------------------------------------- attention-based


class AttentionLearner(LearnerSection):
    """Attention from queries to support samples, conditioned on an embedding of the task."""

    type: Literal["attention"] = "attention"
    kind: Literal["additive", "dot", "multihead"] = "multihead"
    """Score of a query and a key: additive (Bahdanau), scaled dot-product, or several of these side by side."""
    heads: int = Field(default=4, ge=1)
    """Heads of kind multihead, a divisor of units."""
    hard: bool = False
    """Whether each head reads one support sample a query; the gradient is then a straight-through estimate."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the scores before the softmax; of hard attention only in the gradient, whose bias falls with it."""
    self_attention: bool = True
    """Whether support samples first attend to one another."""
    units: int = Field(default=64, ge=2)
    """Width of the attention, of the task embedding and of the layer that scores classes."""
    spatial: bool = False
    """Whether attention goes to the positions of the encoder's maps (conv4_pool with pools 2), not to whole samples."""
    columns: tuple[str, ...] = ()
    """Metadata columns that go into the task embedding; those that the data lacks are left out of account."""

    @model_validator(mode="after")
    def _heads_divide_units(self) -> AttentionLearner:
        if self.kind == "multihead" and self.units % self.heads:
            raise ValueError(f"learner.units must be a multiple of learner.heads = {self.heads}, got {self.units}")
        return self


class SNAIL(LearnerSection):
    """SNAIL (arXiv 1707.03141): causal convolutions and attention over the sequence of support samples and a query."""

    any_way: ClassVar[bool] = False

    type: Literal["snail"] = "snail"
    filters: int = Field(default=64, ge=4, multiple_of=4)
    """Channels of each dense block; the attention blocks' widths are multiples of it. The paper's Omniglot net: 128."""


# -------------------------------------------------------------------------------------------------------- memory-based


class InternalMemory(LearnerSection):
    """A memory of learned content that the support set changes through gates, and that queries read by attention."""

    any_way: ClassVar[bool] = False

    type: Literal["memory"] = "memory"
    slots: int = Field(default=16, ge=1)
    """Slots of the memory."""
    width: int = Field(default=64, ge=1)
    """Width of a slot, a multiple of heads."""
    heads: int = Field(default=4, ge=1)
    """Heads of the attention by which queries read."""
    init: Literal["random", "zero"] = "random"
    """What the initial memory is before training, which learns it: small random numbers, or zeros."""
    carry: bool = False
    """Whether what tasks wrote, on average, is carried on in the initial memory of later tasks, as learner state."""
    ablate: bool = False
    """Whether predictions read the initial memory instead of what the support set made of it. Training is the same."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> InternalMemory:
        if self.width % self.heads:
            raise ValueError(f"learner.width must be a multiple of learner.heads = {self.heads}, got {self.width}")
        return self


class MANN(LearnerSection):
    """Memory-augmented neural network (arXiv 1605.06065): an LSTM that writes to the least used slots of a memory."""

    any_way: ClassVar[bool] = False

    type: Literal["mann"] = "mann"
    controller: int = Field(default=200, ge=1)
    """Hidden units of the LSTM controller."""
    slots: int = Field(default=128, ge=1)
    """Slots of the memory, at least reads."""
    width: int = Field(default=40, ge=1)
    """Width of a slot."""
    reads: int = Field(default=4, ge=1)
    """Heads that read and write."""
    usage_decay: float = Field(default=0.95, ge=0, le=1)
    """Decay γ of the slots' usage a sample."""
    strength: float = Field(default=10.0, gt=0)
    """Factor of the cosines before the softmax over the slots; the paper's is 1."""

    @model_validator(mode="after")
    def _slots_for_all_heads(self) -> MANN:
        if self.slots < self.reads:
            raise ValueError(f"learner.slots must be at least learner.reads = {self.reads}, got {self.slots}")
        return self


class Relational(LearnerSection):
    """Recurrent relational network (arXiv 1711.08028): messages between the support samples and a query."""

    any_way: ClassVar[bool] = False

    type: Literal["relational"] = "relational"
    hidden: int = Field(default=64, ge=1)
    """Width of the nodes and messages."""
    message_steps: int = Field(default=3, ge=1)
    """Steps of message passing, each of which is trained to answer."""


Learner = Annotated[
    MAML
    | ANIL
    | MetaSGD
    | MAMLpp
    | IMAML
    | Reptile
    | LSTMOptimizer
    | ProtoNet
    | Matching
    | Siamese
    | Triplet
    | Relation
    | Ridge
    | AttentionLearner
    | SNAIL
    | EpisodicMemory
    | MetadataMAML
    | InternalMemory
    | MANN
    | Relational,
    Field(discriminator="type"),
]
