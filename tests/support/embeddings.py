"""Made-up embeddings for the tests of the metrics."""

import numpy as np


def blobs(images, identities, d=16, noise=1.0, seed=0):
    """Embeddings around random centers, every identity at least twice."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images - 2 * identities) % (identities - 1)
    labels = rng.permutation(np.concatenate([labels, np.arange(2 * identities) % identities]))
    return rng.normal(size=(identities, d))[labels] + noise * rng.normal(size=(images, d)), labels


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
