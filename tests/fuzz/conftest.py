"""Random inputs: a test takes `seed` and draws its input from `rng`. A failure's id names both, and repeats it alone:
`pytest tests/fuzz -k 'test_pair_lists and 17'`."""

import random

import pytest
import torch


@pytest.fixture
def rng(request: pytest.FixtureRequest, seed: int) -> random.Random:
    """From the name of the test and the seed alone; torch's own generator, too."""
    generator = random.Random(f"{request.node.originalname} {seed}")
    torch.manual_seed(generator.getrandbits(62))
    return generator
