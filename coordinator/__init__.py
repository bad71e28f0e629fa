"""The outer loop: train loop, dispatch, aggregation, meta-state, checkpoints, the command line. Knows ``metaworker``."""
