"""Traces the networks that most processes of `tests.support.processes` ask for, once: in the server that they are
forked from, which imports this. It computes on one thread, as a fork would wait forever for the threads that it does
not have."""

import torch

from tests.support.processes import ready

torch.set_num_threads(1)
for name in ("cnn", "vit"):
    ready(name)
