"""The outer loop: train loop, dispatch, aggregation, meta-state, checkpoints, command line. Knows ``metaworker``."""
