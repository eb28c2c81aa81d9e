"""A search that leaves teachers."""

import pytest

from ekgfx.search import SearchResult, search
from ekgfx.tracing.traced import TracedModel
from tests.search import nets


@pytest.fixture(scope="module")
def searched() -> tuple[TracedModel, SearchResult]:
    traced = nets.cnn()
    return traced, search(traced, nets.batches(), flops=0.75)
