"""`python -m coordinator …` is `metafleet …`: for places where the console script is not on the path."""

import sys

from coordinator.cli import main

sys.exit(main())
