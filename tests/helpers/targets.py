"""Objectives by their plain names, and targets of one kind alone."""

import numpy as np

from rmjax.config import PreferenceConfig
from rmjax.data.batch import Pairs, Ratings, Targets
from rmjax.training.objectives.objective import make_objective

regression = make_objective("regression", (), PreferenceConfig())
bradley_terry = make_objective("bradley_terry", (), PreferenceConfig())


def only_ratings(ratings: Ratings) -> Targets:
    """Targets without a pair."""
    none = np.zeros((*ratings.labels.shape[:-2], 1), np.float32)
    slots = none.astype(np.int32)
    return Targets(ratings, Pairs._make([slots, slots, none, none]))


def only_pairs(pairs: Pairs, slots: int, attributes: int) -> Targets:
    """Targets without a rating."""
    none = np.zeros((*pairs.weights.shape[:-1], slots, attributes), np.float32)
    return Targets(Ratings._make([none, none]), pairs)
