"""Metrics of embeddings on identities never trained on: verification, identification, distances.

Letters: N images, d features, P pairs, G genuine scores (pairs of one identity), I impostor scores, C classes.
Each module says which definitions it follows and how it counts ties:

    verification     cosines of pairs, TAR at FAR, ROC, accuracy at the best threshold
    ten_folds        accuracy over ten folds in three public variants, VAL at FAR
    identification   CMC and rank k, with distractors; open-set DIR at FAR; coverage at precision
    features         inter- and intra-class distance, the mirror trick
    pair_lists       LFW's pairs.txt, InsightFace's verification sets;  sampling: pairs for data without a list
    summary          the numbers of a report
"""

from fastmargin.evaluation.arrays import Array
from fastmargin.evaluation.features import Mirror, class_distances, mirrored
from fastmargin.evaluation.identification import (
    classify,
    cmc,
    coverage_at_precision,
    dir_at_far,
    megaface_cmc,
    prototypes,
    rank_k,
)
from fastmargin.evaluation.pair_lists import ImagePairs, PairList, read_bin, read_pairs
from fastmargin.evaluation.sampling import Pairs, sample_pairs
from fastmargin.evaluation.summary import evaluate_embeddings, evaluate_pairs
from fastmargin.evaluation.ten_folds import Variant, validation_rate, verification_accuracy
from fastmargin.evaluation.verification import best_accuracy, cosine_scores, roc, tar_at_far

__all__ = [
    "Array",
    "ImagePairs",
    "Mirror",
    "PairList",
    "Pairs",
    "Variant",
    "best_accuracy",
    "class_distances",
    "classify",
    "cmc",
    "cosine_scores",
    "coverage_at_precision",
    "dir_at_far",
    "evaluate_embeddings",
    "evaluate_pairs",
    "megaface_cmc",
    "mirrored",
    "prototypes",
    "rank_k",
    "read_bin",
    "read_pairs",
    "roc",
    "sample_pairs",
    "tar_at_far",
    "validation_rate",
    "verification_accuracy",
]
