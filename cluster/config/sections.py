"""The sections of a run's configuration, unions chosen by ``type``; those of learners are in ``learners``.

Field docstrings are the ``--help`` text: meaning and unit. This module imports nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config.base import Section

# ---------------------------------------------------------------------------------------------------------------- data


class ListedSplit(Section):
    """Class splits by explicit lists of class names; classes in no list are unused."""

    type: Literal["lists"] = "lists"
    train: tuple[str, ...] = Field(min_length=1)
    """Names of the training classes."""
    val: tuple[str, ...] = ()
    """Names of the validation classes."""
    test: tuple[str, ...] = ()
    """Names of the test classes."""


class MetadataSplit(Section):
    """Whole groups of classes held out by a class metadata column (alphabets, scripts); all other classes train."""

    type: Literal["metadata"] = "metadata"
    column: str = Field(min_length=1)
    """Class metadata column that names the group, for instance alphabet."""
    val: tuple[str, ...] = ()
    """Groups whose classes are the validation classes."""
    test: tuple[str, ...] = ()
    """Groups whose classes are the test classes."""


class FractionSplit(Section):
    """Seeded fractions of the classes; the rest train."""

    type: Literal["fractions"] = "fractions"
    val: float = Field(default=0.15, ge=0, lt=1)
    """Fraction of the classes for validation."""
    test: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of the classes for test."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the shuffle of classes; apart from the run's seed, so that runs of many seeds share one split."""

    @model_validator(mode="after")
    def _some_train(self) -> FractionSplit:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test must be < 1, so that some classes train, got {self.val} + {self.test}")
        return self


Split = Annotated[ListedSplit | MetadataSplit | FractionSplit, Field(discriminator="type")]


class Augment(Section):
    """Random affine distortion of every image of split train, about its centre and each by itself; all zeros: off."""

    rotate: float = Field(default=0.0, ge=0, le=180)
    """Largest turn either way, degrees."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Largest change of size, larger or smaller, as a fraction of it."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift along the width and along the height, as a fraction of the side."""
    shear: float = Field(default=0.0, ge=0, le=60)
    """Largest shear either way, degrees."""


class GlyphsData(Section):
    """The embedded source: characters of many scripts in real typefaces, split by script. Needs no file."""

    type: Literal["glyphs"] = "glyphs"
    size: int = Field(default=28, ge=8, le=256)
    """Height and width of a sample, pixels."""
    rotations: bool = False
    """Whether 90° rotations are extra classes in training (never in evaluation)."""
    augment: Augment = Augment()
    """How training images are distorted."""


class StoreData(Section):
    """An episode store on disk, given by --store, with a class split."""

    type: Literal["store"] = "store"
    split: Split = FractionSplit()
    """How classes are split."""
    rotations: bool = False
    """Whether 90° rotations are extra classes in training (never in evaluation); square images only."""
    augment: Augment = Augment()
    """How training images are distorted; images only."""


class SinusoidData(Section):
    """The embedded regression source of the MAML paper: y = A sin(x − phase)."""

    type: Literal["sinusoid"] = "sinusoid"
    amplitude: tuple[float, float] = (0.1, 5.0)
    """Range of the amplitude A, uniform."""
    phase: tuple[float, float] = (0.0, 3.141592653589793)
    """Range of the phase, uniform, radians."""
    x: tuple[float, float] = (-5.0, 5.0)
    """Range of the inputs x, uniform."""
    metadata: Literal["given", "hidden", "shuffled", "constant"] = "given"
    """Whether episodes carry their amplitude and phase or missing ones; as controls, another's, or all the same."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> SinusoidData:
        for name in ("amplitude", "phase", "x"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} must be [low, high] with low < high, got [{low}, {high}]")
        return self


Data = Annotated[GlyphsData | StoreData | SinusoidData, Field(discriminator="type")]


class EpisodeShape(Section):
    """What a training episode holds."""

    way: int = Field(default=5, ge=1)
    """Classes an episode (1 for regression)."""
    shot: int = Field(default=1, ge=1)
    """Support samples a class."""
    query: int = Field(default=15, ge=1)
    """Query samples a class."""
    within: str | None = None
    """Class metadata column whose value all classes of an episode share, for instance alphabet; any classes if none."""


class Shard(Section):
    """The unit of dispatch. Never derived from the number of workers: it decides the bits of the result."""

    episodes: int = Field(default=8, ge=1)
    """Consecutive episodes a shard."""
    chunk: int = Field(default=8, ge=1)
    """Episodes vectorised at once inside a worker; fewer take less memory."""


# -------------------------------------------------------------------------------------------------------------- models

BatchNorm = Literal["transductive", "support", "running"]
"""Where batch statistics come from: the set at hand, the support set, or the running averages in the learner state."""


class Conv4Strided(Section):
    """Four 3×3 convolutions of stride 2, batch-norm, ReLU; mean over space; linear head (MAML's and Reptile's net)."""

    type: Literal["conv4_strided"] = "conv4_strided"
    channels: int = Field(default=64, ge=1)
    """Channels of every convolution."""
    batch_norm: BatchNorm = "transductive"
    """Batch statistics: of the set at hand (transductive), of the support set (support), or running averages."""


class Conv4Pool(Section):
    """Four blocks of 3×3 convolution, batch-norm, ReLU, 2×2 max-pool (the Prototypical Networks encoder)."""

    type: Literal["conv4_pool"] = "conv4_pool"
    channels: int = Field(default=64, ge=1)
    """Channels of every convolution."""
    pools: int = Field(default=4, ge=0, le=4)
    """Blocks that pool, the first ones; 2 leaves a map that Relation Networks compare."""
    batch_norm: BatchNorm = "transductive"
    """Batch statistics: of the set at hand (transductive), of the support set (support), or running averages."""


class MLP(Section):
    """A multilayer perceptron with ReLU and no batch-norm (MAML's sinusoid net)."""

    type: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (40, 40)
    """Widths of the hidden layers, units."""


Model = Annotated[Conv4Strided | Conv4Pool | MLP, Field(discriminator="type")]

# -------------------------------------------------------------------------------------------------------- outer update


class SyncAggregator(Section):
    """Synchronous: each version is the mean over a fixed number of shards, reduced in a fixed binary tree."""

    type: Literal["sync"] = "sync"
    shards: int = Field(default=4, ge=1)
    """Shards a version."""


class AsyncAggregator(Section):
    """Asynchronous with bounded staleness; buffered when ``buffer`` is above 1 (FedBuff, arXiv 2106.06639)."""

    type: Literal["async"] = "async"
    staleness_bound: int = Field(default=8, ge=0)
    """Largest staleness that is applied, versions; older contributions are dropped and counted."""
    staleness_exponent: float = Field(default=0.5, ge=0, le=10)
    """Exponent a of the weight (1 + staleness)^−a."""
    buffer: int = Field(default=1, ge=1)
    """Contributions a commit."""


Aggregator = Annotated[SyncAggregator | AsyncAggregator, Field(discriminator="type")]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Adam(Section):
    """Adam or, with weight decay, AdamW as the outer optimizer."""

    type: Literal["adam"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    """Outer step size before the schedule."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the moment estimates."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay a step."""


class SGD(Section):
    """Stochastic gradient descent as the outer optimizer (Reptile's outer step)."""

    type: Literal["sgd"] = "sgd"
    lr: float = Field(default=1.0, gt=0)
    """Outer step size before the schedule."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Share of the last update that is added to the next."""


Optimizer = Annotated[Adam | SGD, Field(discriminator="type")]


class ConstantSchedule(Section):
    """The step size stays."""

    type: Literal["constant"] = "constant"


class LinearSchedule(Section):
    """The step size goes linearly from 1 to ``final`` times the optimizer's lr over the run."""

    type: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0)
    """Factor at the last version."""


class CosineSchedule(Section):
    """The step size goes along half a cosine from 1 to ``final`` times the optimizer's lr over the run."""

    type: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0)
    """Factor at the last version."""
    warmup: int = Field(default=0, ge=0)
    """Versions of linear warm-up at the start."""


class StepSchedule(Section):
    """The step size is multiplied by ``factor`` every ``every`` versions."""

    type: Literal["step"] = "step"
    every: int = Field(default=2000, ge=1)
    """Versions between two drops."""
    factor: float = Field(default=0.5, gt=0, le=1)
    """Factor at each drop."""


Schedule = Annotated[ConstantSchedule | LinearSchedule | CosineSchedule | StepSchedule, Field(discriminator="type")]

# ----------------------------------------------------------------------------------------------------------- execution


class Evaluation(Section):
    """What is evaluated, for validation while training and for the report at the end."""

    way: int | None = Field(default=None, ge=1)
    """Classes an episode; the training episode's when not given."""
    shot: int | None = Field(default=None, ge=1)
    """Support samples a class; the training episode's when not given."""
    query: int | None = Field(default=None, ge=1)
    """Query samples a class; the training episode's when not given."""
    within: str | None = None
    """As episode.within; the training episode's when not given, any classes when empty."""
    episodes: int = Field(default=600, ge=2)
    """Episodes of the evaluation at the end and of `metafleet evaluate`."""
    every: int = Field(default=500, ge=0)
    """Versions between two validations; 0 for none."""
    val_episodes: int = Field(default=200, ge=2)
    """Episodes a validation."""


class Execution(Section):
    """Where and how the run executes. Nothing here changes a synchronous result; all of it may change on resume."""

    run_dir: str | None = None
    """Run directory, made by the run; runs/RECIPE-DATE-TIME when not given."""
    store: str | None = None
    """Path of the episode store (same as --store)."""
    address: str = "local"
    """Ray cluster: local starts one on this machine for the run; auto or HOST:PORT joins a running one."""
    workers: int | None = Field(default=None, ge=1)
    """Worker actors; when not given, as many as the cluster's free CPUs (or GPUs) allow."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs each worker reserves; fractions are allowed."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs each worker reserves; fractions are allowed."""
    in_flight: int = Field(default=2, ge=1)
    """Shards in flight for each worker."""
    attempts: int = Field(default=3, ge=1)
    """Failed attempts of one shard after which it is a poison shard and the run stops."""
    min_workers: int = Field(default=1, ge=1)
    """Workers below which the run waits for more."""
    verify: float = Field(default=0.0, ge=0, le=1)
    """Share of the shards that two workers compute before the commit, compared bit for bit; a third one settles it."""
    speculation: float = Field(default=2.0, ge=0)
    """Idle workers take over what waits behind others, and copy what takes so many times as long there; 0 for never."""
    copies: float = Field(default=0.25, ge=0, le=1)
    """Most speculative copies at a time, as a share of the workers; at least one."""
    deadline: float = Field(default=20.0, ge=0)
    """Running medians of a shard's time after which its worker is taken for hung and replaced; 0 for never."""
    deadline_floor: float = Field(default=60.0, gt=0)
    """Least seconds of a deadline; ten times as many while no median is known."""
    backoff: float = Field(default=1.0, gt=0)
    """Seconds before a slot's second new worker in a row; doubled each time, a minute at most."""
    node_failures: int = Field(default=3, ge=1)
    """Failures within execution.quarantine after which a node gets no new workers for as long, if there is another."""
    quarantine: float = Field(default=300.0, gt=0)
    """Seconds that a failing node is kept out."""
    pool: Literal["strict", "mixed"] = "strict"
    """Whether workers of different hardware are refused (strict) or the run is labelled mixed, its bits unpromised."""
    other_hardware: bool = False
    """Whether a resume may go on where the fingerprint differs from the run's."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Versions between two checkpoints."""
    keep: int = Field(default=3, ge=1)
    """Checkpoints kept, besides the best by validation."""
    log_every: float = Field(default=5.0, gt=0)
    """Seconds between two progress lines where there is no terminal."""
    metrics: bool = True
    """Whether the coordinator serves Prometheus metrics."""
    metrics_host: str = "127.0.0.1"
    """Address that the metrics endpoint binds to."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the metrics endpoint; 0 takes a free one and says which."""
    metrics_discovery: str | None = None
    """Folder in which the endpoint is announced to Prometheus while the run lives (file_sd)."""
    start_timeout: float = Field(default=120.0, gt=0)
    """Seconds to wait for the workers to start."""

    @field_validator("address")
    @classmethod
    def _reachable_form(cls, address: str) -> str:
        if address.startswith("ray://"):
            raise ValueError(
                f"must be local, auto or HOST:PORT, got '{address}'; Ray Client (ray://) is not supported: "
                "run on the cluster with `ray job submit`, or join it with HOST:PORT"
            )
        host, _, port = address.rpartition(":")
        if address not in ("local", "auto") and not (host and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(f"must be local, auto or HOST:PORT, got '{address}'")
        return address
