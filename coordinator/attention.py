"""``metafleet attention``: where the queries of one held-out episode look, of a run with an attention learner."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from cluster.config.loading import load_resolved
from cluster.device import prepare
from cluster.episodes import open_source
from cluster.episodes.sampler import StoreSource
from cluster.episodes.types import Episodes
from cluster.errors import ConfigError
from cluster.flat import some_tensor
from coordinator import checkpoint as checkpoints
from coordinator.commands import AttentionOptions
from coordinator.evaluate import check_held_out, choose_checkpoint, with_store
from coordinator.meta_state import MetaState
from coordinator.replay import check_config
from coordinator.run_dir import RunDirectory
from metaworker.learners import build_learner
from metaworker.learners.attention import attention_weights
from metaworker.learners.embedding import EmbeddingLearner
from metaworker.metadata import encode

PICTURE: Final = "attention.png"
"""In the run directory, unless another path is given."""


@dataclass(frozen=True)
class EpisodeAttention:
    """Where the queries of one episode look."""

    classes: tuple[str, ...]
    """Names of the episode's classes, by label."""
    support_x: Float32[np.ndarray, "support channel height width"]
    """Images in [0, 1]."""
    support_y: Int64[np.ndarray, " support"]
    query_x: Float32[np.ndarray, "query channel height width"]
    query_y: Int64[np.ndarray, " query"]
    predicted: Int64[np.ndarray, " query"]
    """Labels that the learner gives the queries."""
    support_maps: Float64[np.ndarray, "query support rows columns"]
    """Attention to the positions of each support sample, mean over heads; of each query it sums to 1."""
    query_maps: Float64[np.ndarray, "query rows columns"]
    """Attention to the query's own positions; of each query it sums to 1."""

    @property
    def samples(self) -> Float64[np.ndarray, "query support"]:
        """Attention to each support sample; of each query it sums to 1."""
        return np.asarray(self.support_maps.sum((2, 3)))

    @property
    def on_right_class(self) -> Float64[np.ndarray, " query"]:
        """Attention to the support samples of the query's own class."""
        own = self.support_y == self.query_y[:, None]
        return np.asarray(np.where(own, self.samples, 0.0).sum(1))

    @property
    def chance(self) -> float:
        """What the right class gets of attention that is equal on all samples."""
        return 1 / len(self.classes)

    @property
    def spatial(self) -> bool:
        """Whether there are positions to tell apart."""
        return self.support_maps.shape[2:] != (1, 1)

    def outcome(self) -> str:
        """How much of the attention the right class gets, in words."""
        return (
            f"the right class gets {100 * self.on_right_class.mean():.1f} % of the attention on average over the "
            f"{len(self.query_y)} queries (chance {100 * self.chance:.3g} %)"
        )


def look(learner: EmbeddingLearner, state: MetaState, episode: Episodes, classes: tuple[str, ...]) -> EpisodeAttention:
    """Adapt to one episode and see where its queries look.

    Args:
        learner: an attention learner for episodes of as many classes.
        state: the version to look at.
        episode: a single one.
        classes: names of its classes.
    """
    theta = state.layout.unflatten(state.theta)
    statistics = {name: torch.from_numpy(rows.copy()) for name, rows in state.state.items()}
    metadata = {name: rows[0] for name, rows in encode(episode.metadata, some_tensor(theta)).items()}
    support_x, support_y, query_x = episode.support_x[0], episode.support_y[0], episode.query_x[0]
    with torch.no_grad():
        *_, task = learner.adapt(theta, statistics, support_x, support_y, metadata)
        weights = attention_weights(learner, task, query_x)
        predicted = learner.predict(task, query_x).argmax(-1)
    return EpisodeAttention(
        classes,
        support_x.numpy(),
        support_y.numpy(),
        query_x.numpy(),
        episode.query_y[0].numpy(),
        predicted.numpy(),
        weights.support.double().mean(0).numpy(),
        weights.query.double().numpy(),
    )


def attention_command(run: Path, options: AttentionOptions, *, as_json: bool) -> dict[str, Any]:
    """Look at one episode, and draw it.

    Raises:
        ConfigError: samples that are no pictures, or a folder in the picture's place.
        CheckpointError: no such checkpoint, or one that does not fit the data.
        SplitError: the data cannot give such episodes.
        OSError: the picture cannot be written.
    """
    directory = RunDirectory.open(run)
    identity, config = directory.identity(), load_resolved(directory.config)
    check_config(directory, identity, config)
    shape, config = config.evaluation_shape, with_store(config, options.store, options.split)
    split = options.split or ("all" if options.store else "test")
    picture = _picture_path(run, options.picture, identity.sample_shape)
    prepare("cpu", threads=1)
    source = open_source(config)
    check_held_out(identity, source, options.store)
    assert isinstance(source, StoreSource)  # what classifies has classes
    episode = source.sample(split, options.episode, 1, shape.way, shape.shot, shape.query, shape.within)
    learner = build_learner(config, source.sample_shape, shape.way)
    assert isinstance(learner, EmbeddingLearner)  # as the command has seen
    path, chosen = choose_checkpoint(directory, options.checkpoint)
    state = checkpoints.load(path, MetaState.initial(config, learner).layout).state
    if options.checkpoint != chosen:
        print("no validation has named a best checkpoint: looking at the last one", file=sys.stderr)
    seen = look(learner, state, episode, _names(source, episode))

    from coordinator.attention_picture import attention_picture

    what = f"{split} episode {options.episode}", f"{shape.way}-way {shape.shot}-shot", f"version {state.version}"
    attention_picture(seen, picture, title=" · ".join((config.name, *what)))
    if not as_json:
        print(f"{seen.outcome()}\n{picture}")
    return {
        "run": str(run),
        "store": None if options.store is None else str(options.store),
        "split": split,
        "episode": options.episode,
        "way": shape.way,
        "shot": shape.shot,
        "within": shape.within,
        "queries": len(seen.query_y),
        "checkpoint": chosen,
        "version": state.version,
        "digest": state.digest,
        "on_right_class": float(seen.on_right_class.mean()),
        "chance": seen.chance,
        "accuracy": float((seen.predicted == seen.query_y).mean()),
        "classes": list(seen.classes),
        "support_labels": seen.support_y.tolist(),
        "query_labels": seen.query_y.tolist(),
        "predicted_labels": seen.predicted.tolist(),
        "weights": seen.samples.tolist(),
        "picture": str(picture),
    }


def _picture_path(run: Path, wanted: Path | None, sample_shape: Any) -> Path:
    """Where to draw, if samples of that shape can be drawn there."""
    if len(sample_shape) != 3 or sample_shape[0] not in (1, 3):
        raise ConfigError(
            f"{run}: its samples have shape {list(sample_shape)} and are no grey or colour pictures: nothing to draw on"
        )
    path = run / PICTURE if wanted is None else wanted
    if path.is_dir():
        raise ConfigError(f"--picture {path} is a folder: give the path of a PNG file")
    return path


def _names(source: StoreSource, episode: Episodes) -> tuple[str, ...]:
    """Of the classes of a single episode; a turned class says by how much, counter-clockwise."""
    pairs = zip(episode.metadata["class_index"][0], episode.metadata["class_turns"][0], strict=True)
    return tuple(source.classes[index] + (f" {90 * turns}°" if turns else "") for index, turns in pairs)
