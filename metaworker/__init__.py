"""Learning: backbones, learners, the inner loop, and the worker around them. Knows ``cluster`` only."""
