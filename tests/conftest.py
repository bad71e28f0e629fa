"""All tests run on one thread, with the annotated shapes of ``metaworker`` and ``cluster.flat`` checked."""

from __future__ import annotations

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before any test module imports them. The rest of `cluster` annotates numpy arrays, and is tested without.
install_import_hook(["cluster.flat", "metaworker"], "beartype.beartype")
torch.set_num_threads(1)
# Machines are shared: how long an example takes says nothing. The same examples every time: what fails, fails again.
settings.register_profile("metafleet", deadline=None, derandomize=True)
settings.load_profile("metafleet")
