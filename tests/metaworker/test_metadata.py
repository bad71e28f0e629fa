"""Metadata as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch.testing import assert_close

from metaworker.metadata import TEXT_WIDTH, encode, features_width, task_features

LIKE = torch.zeros(1, dtype=torch.float64)


def test_numbers_stay_and_missing_ones_are_masked() -> None:
    encoded = encode({"amplitude": np.array([0.5, np.nan, -2.0])}, LIKE)
    assert_close(encoded["amplitude"], torch.tensor([[0.5], [0.0], [-2.0]], dtype=torch.float64))
    assert encoded["amplitude/known"].tolist() == [1.0, 0.0, 1.0]


def test_texts_are_told_apart_by_their_letters() -> None:
    column = np.array([["Greek", "Korean", "Greek"], ["Grek", "", "greek"]])
    encoded = encode({"alphabet": column}, LIKE)
    rows = encoded["alphabet"]
    assert rows.shape == (2, 3, TEXT_WIDTH) and encoded["alphabet/known"].tolist() == [[1, 1, 1], [1, 0, 1]]
    assert torch.equal(rows[0, 0], rows[0, 2]) and torch.equal(rows[0, 0], rows[1, 2])
    assert not rows[1, 1].any()
    assert_close(rows[0].norm(dim=-1), torch.ones(3, dtype=torch.float64))
    similar, other = rows[0, 0] @ rows[1, 0], rows[0, 0] @ rows[0, 1]
    assert similar > 0.3 > other


def test_codes_are_the_same_on_every_machine() -> None:
    found = encode({"script": np.array(["Lao"])}, LIKE)["script"][0]
    assert found.nonzero().flatten().tolist() == [8, 16, 18]


def test_counts_are_numbers_too() -> None:
    assert encode({"class_index": np.array([[3, 1]])}, LIKE)["class_index"].tolist() == [[[3.0], [1.0]]]


def test_a_task_s_features_are_means_over_its_classes_and_say_what_is_known() -> None:
    columns = {"alphabet": np.array([["Greek", "Lao"], ["", ""], ["Greek", ""]]), "phase": np.array([2.0, np.nan, 1.0])}
    encoded = encode(columns, LIKE)
    names = ("phase", "alphabet", "script")
    whole, nothing, half = (task_features({k: v[e] for k, v in encoded.items()}, names, LIKE) for e in range(3))
    assert len(whole) == features_width(names) == 3 * (TEXT_WIDTH + 1)
    phase, alphabet, script = whole.split(TEXT_WIDTH + 1)
    assert phase[0] == 2 and phase[-1] == 1 and not phase[1:-1].any()
    assert_close(alphabet[:-1], encoded["alphabet"][0].mean(0))
    assert alphabet[-1] == 1
    assert not script.any() and not nothing.any()
    _, alphabet, _ = half.split(TEXT_WIDTH + 1)
    assert_close(alphabet[:-1], encoded["alphabet"][0, 0])
    assert alphabet[-1] == 0.5
