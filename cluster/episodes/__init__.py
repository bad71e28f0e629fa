"""Episodes: store, ingest and shipping, class splits, sampler, and the embedded sources; ``open_source`` joins them."""

from __future__ import annotations

from pathlib import Path

from cluster.config.run import RunConfig
from cluster.config.sections import GlyphsData, SinusoidData, StoreData
from cluster.episodes.types import EpisodeSource
from cluster.errors import ConfigError


def open_source(config: RunConfig) -> EpisodeSource:
    """The episode source that ``config`` names.

    Raises:
        ConfigError: the configuration needs a store and none is given.
        StoreMissingError: this node has nothing at the store's path (``shipping`` brings it).
        StoreError, SplitError: the store or the split cannot be used.
    """
    from cluster.episodes.sampler import StoreSource
    from cluster.episodes.store import EpisodeStore

    match config.data:
        case SinusoidData() as data:
            from cluster.episodes.sinusoid import SinusoidSource

            return SinusoidSource(data, config.seed)
        case GlyphsData() as data:
            from cluster.episodes.glyphs import GLYPHS_SPLIT, glyphs_store

            store = EpisodeStore.open(glyphs_store(data.size))
            return StoreSource(store, GLYPHS_SPLIT, config.seed, data.rotations, data.augment)
        case StoreData() as data:
            path = config.execution.store
            if path is None:
                raise ConfigError(
                    f"recipe {config.name!r} reads an episode store and none is given: add --store STORE "
                    "(make one with `metafleet ingest`)"
                )
            return StoreSource(EpisodeStore.open(Path(path)), data.split, config.seed, data.rotations, data.augment)
