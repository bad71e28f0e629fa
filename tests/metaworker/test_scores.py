"""Scores against loops written out plainly, and their independence of how episodes were split into parts."""

from __future__ import annotations

import dataclasses
import json
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import EvaluationPart
from metaworker.scores import combine, format_score

WAY, QUERY, STEPS = 4, 6, 3


def labels(episodes: int, seed: int = 0) -> np.ndarray:
    """Predicted classes ``[episode, step, query]``; class 3 is never predicted before adaptation in episode 0."""
    predicted = np.random.default_rng(seed).integers(0, WAY, (episodes, STEPS, WAY * QUERY))
    predicted[0, 0] %= 3
    return predicted


TRUE = np.repeat(np.arange(WAY), QUERY)


def confusion_of(predicted: np.ndarray) -> np.ndarray:
    confusion = np.zeros((*predicted.shape[:2], WAY, WAY), dtype=np.int64)
    for episode, step, query in np.ndindex(predicted.shape):
        confusion[episode, step, TRUE[query], predicted[episode, step, query]] += 1
    return confusion


def split_at(cuts: list[int], loss: np.ndarray, scores: np.ndarray, *, regression: bool, first: int = 40):
    """Parts of an evaluation whose episode ids start at ``first``, cut before the given rows."""
    edges = [0, *cuts, len(loss)]
    return [
        EvaluationPart(
            part=part,
            version=5,
            attempt=0,
            worker=0,
            first_episode=first + low,
            loss=loss[low:high],
            confusion=None if regression else scores[low:high],
            squared_error=scores[low:high] if regression else None,
        )
        for part, (low, high) in enumerate(pairwise(edges))
    ]


def plain_macro(predicted: list[int]) -> tuple[float, float, float, float]:
    """Accuracy, macro precision, recall and F1 of one episode, counted one query at a time."""
    precision, recall, f1 = [], [], []
    for c in range(WAY):
        tp = sum(t == c and p == c for t, p in zip(TRUE, predicted, strict=True))
        fp = sum(t != c and p == c for t, p in zip(TRUE, predicted, strict=True))
        fn = sum(t == c and p != c for t, p in zip(TRUE, predicted, strict=True))
        precision.append(tp / (tp + fp) if tp + fp else 0.0)
        recall.append(tp / (tp + fn))
        f1.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    accuracy = sum(t == p for t, p in zip(TRUE, predicted, strict=True)) / len(TRUE)
    return accuracy, statistics.mean(precision), statistics.mean(recall), statistics.mean(f1)


def test_classification_scores_are_what_counting_by_hand_gives() -> None:
    predicted = labels(30)
    loss = np.random.default_rng(1).random((30, STEPS)).astype(np.float32)
    scores = combine(split_at([7, 8, 21], loss, confusion_of(predicted), regression=False))
    assert (scores.metric, scores.episodes, scores.mse) == ("accuracy", 30, None)
    for step in range(STEPS):
        by_hand = [plain_macro(predicted[episode, step].tolist()) for episode in range(30)]
        accuracy, precision, recall, f1 = (list(column) for column in zip(*by_hand, strict=True))
        assert scores.accuracy[step] == pytest.approx(statistics.mean(accuracy), abs=1e-14)
        assert scores.precision[step] == pytest.approx(statistics.mean(precision), abs=1e-14)
        assert scores.recall[step] == pytest.approx(statistics.mean(recall), abs=1e-14)
        assert scores.f1[step] == pytest.approx(statistics.mean(f1), abs=1e-14)
        assert scores.ci95[step] == pytest.approx(1.96 * statistics.stdev(accuracy) / 30**0.5, abs=1e-14)
        assert scores.loss[step] == pytest.approx(statistics.mean(loss[:, step].tolist()), abs=1e-12)


def test_a_class_that_is_never_predicted_counts_as_zero_precision() -> None:
    all_to_class_0 = np.zeros((2, 1, WAY * QUERY), dtype=int)
    scores = combine(split_at([], np.zeros((2, 1)), confusion_of(all_to_class_0), regression=False))
    assert scores.accuracy == (0.25,)
    assert scores.precision == (0.25 / 4,)
    assert scores.recall == (0.25,)
    assert scores.f1 == (pytest.approx(0.4 / 4),)
    assert scores.ci95 == (0.0,)


def test_regression_scores_are_mean_and_interval_of_the_squared_errors() -> None:
    errors = np.random.default_rng(2).gamma(1.0, 2.0, (50, 11))
    scores = combine(split_at([25], errors, errors, regression=True))
    assert (scores.metric, scores.accuracy, scores.f1) == ("mse", None, None)
    for step in range(11):
        column = errors[:, step].tolist()
        assert scores.mse[step] == pytest.approx(statistics.mean(column), rel=1e-14)
        assert scores.ci95[step] == pytest.approx(1.96 * statistics.stdev(column) / 50**0.5, rel=1e-13)


@given(cuts=st.sets(st.integers(1, 39)), order=st.randoms(use_true_random=False))
def test_parts_and_their_order_do_not_change_a_bit(cuts: set[int], order) -> None:
    loss = np.random.default_rng(3).random((40, STEPS)).astype(np.float32)
    confusion = confusion_of(labels(40, seed=3))
    for regression, scores in ((False, confusion), (True, loss**2)):
        parts = split_at(sorted(cuts), loss, scores, regression=regression)
        order.shuffle(parts)
        assert combine(parts) == combine(split_at([], loss, scores, regression=regression))


def test_plain_data_has_the_final_step_by_name_and_every_step_in_a_list() -> None:
    scores = combine(split_at([3], np.ones((9, STEPS)), confusion_of(labels(9)), regression=False))
    plain = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert set(plain) == {"accuracy", "ci95", "precision", "recall", "f1", "loss", "steps", "steps_ci95", "episodes"}
    assert plain["accuracy"] == scores.accuracy[-1] == plain["steps"][-1]
    assert plain["steps"] == list(scores.accuracy)
    assert plain["ci95"] == scores.ci95[-1] == plain["steps_ci95"][-1]
    assert (plain["precision"], plain["recall"], plain["f1"]) == (
        scores.precision[-1],
        scores.recall[-1],
        scores.f1[-1],
    )
    assert (plain["loss"], plain["episodes"]) == (1.0, 9)


def test_a_diverged_regression_is_null_in_plain_data_and_not_hidden_in_the_scores() -> None:
    errors = np.array([[1.0, np.nan], [2.0, 3.0]])
    scores = combine(split_at([], errors, errors, regression=True))
    assert np.isnan(scores.mse[1])
    plain = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert (plain["mse"], plain["ci95"], plain["steps"]) == (None, None, [1.5, None])
    assert "accuracy" not in plain
    assert "f1" not in plain


def test_episodes_that_are_missing_or_given_twice_are_refused() -> None:
    loss = np.zeros((9, STEPS))
    parts = split_at([3, 6], loss, loss, regression=True)
    with pytest.raises(ValueError, match="missing: expected 43 next, got 46"):
        combine([parts[0], parts[2]])
    with pytest.raises(ValueError, match="given twice: expected 46 next, got 43"):
        combine([*parts, parts[1]])
    with pytest.raises(ValueError, match="no evaluation parts"):
        combine([])
    with pytest.raises(ValueError, match="at least 2"):
        combine(split_at([], loss[:1], loss[:1], regression=True))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    loss = np.zeros((4, STEPS))
    classified, regressed = confusion_of(labels(4)), loss
    with pytest.raises(ValueError, match="differ in"):
        combine(
            [
                split_at([2], loss, classified, regression=False)[0],
                split_at([2], loss, regressed, regression=True)[1],
            ]
        )
    first, second = split_at([2], loss, regressed, regression=True)
    with pytest.raises(ValueError, match="differ in"):
        combine([first, dataclasses.replace(second, version=6)])
    with pytest.raises(ValueError, match="start with"):
        combine(split_at([], loss, classified[:, :1], regression=False))
    with pytest.raises(ValueError, match="either confusion"):
        combine([EvaluationPart(0, 5, 0, 0, 0, loss, None, None)])


def test_scores_read_well() -> None:
    assert format_score("accuracy", 0.8312, 0.00876) == "83.1 ± 0.9 %"
    assert format_score("accuracy", 1.0) == "100.0 %"
    assert format_score("mse", 0.35219, 0.0123) == "0.352 ± 0.012"
    assert format_score("mse", 0.7, 0.0213) == "0.700 ± 0.021"
    assert format_score("mse", 1234.5, 6.0) == "1234 ± 6"
    assert format_score("mse", float("nan"), 0.1) == "–"
    assert format_score("accuracy", None) == "–"
