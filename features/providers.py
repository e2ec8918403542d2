"""What execution providers of targets beside the CPU do in a worker."""

from __future__ import annotations

from features.devices import providers

NOT_RUN, NOT_TAKEN, NO_THREAD = providers.NOT_RUN, providers.NOT_TAKEN, providers.NO_THREAD
add_target, check_tensors = providers.add_target, providers.check_tensors
count_operators, find_targets = providers.count_operators, providers.find_targets
