import pytest
import torch
from torch.testing import assert_close

from sdkit.batches import Counts
from sdkit.language.specs import Constant, PerSequence, PerToken, PerTurn, SequenceSum, Sum
from sdkit.losses import average
from sdkit.losses.objective import row_weights

ROWS = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0], [5.0], []]

GOLDEN = [
    (PerToken(), 6.428571),
    (PerSequence(empty_rows="skip"), 7.5),
    (PerSequence(empty_rows="count"), 5.625),
    (SequenceSum(), 15.0),
    (Constant(length=4.0), 2.8125),
    (Sum(), 45.0),
]


def counts_of(rows):
    lengths = [len(r) for r in rows]
    filled = sum(n > 0 for n in lengths)
    return Counts(rows=len(rows), filled_rows=filled, turns=filled, tokens=sum(lengths))


def loss_of(spec, rows, counts):
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    weights = row_weights(spec, lengths, counts)
    assert weights.dtype == torch.float32
    assert lengths._version == 0
    return sum(w * sum(r) for w, r in zip(weights.tolist(), rows, strict=True))


@pytest.mark.parametrize(("spec", "golden"), GOLDEN)
def test_golden_values(spec, golden):
    assert loss_of(spec, ROWS, counts_of(ROWS)) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(("spec", "golden"), GOLDEN)
@pytest.mark.parametrize("parts", [[(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)], [(0, 4), (4, 4)]])
def test_micro_batches_add_up_to_the_batch(spec, golden, parts):
    counts = counts_of(ROWS)
    total = sum(loss_of(spec, ROWS[a:b], counts) for a, b in parts)
    assert total == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(("spec", "golden"), GOLDEN)
def test_row_order_changes_nothing(spec, golden):
    assert loss_of(spec, ROWS[::-1], counts_of(ROWS)) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("spec", [PerTurn(), *(spec for spec, _ in GOLDEN)])
def test_empty_rows_have_no_weight(spec):
    empty = torch.zeros(3, dtype=torch.long)
    none = Counts(rows=0, filled_rows=0, turns=0, tokens=0)
    for counts in (none, Counts(rows=3, filled_rows=0, turns=0, tokens=0)):
        assert row_weights(spec, empty, counts).tolist() == [0.0, 0.0, 0.0]
    assert row_weights(spec, empty[:0], none).shape == (0,)


@pytest.mark.parametrize("spec", [spec for spec, _ in GOLDEN if spec != Sum()])
def test_global_counts_of_zero_give_zero_weights(spec):
    none = Counts(rows=0, filled_rows=0, turns=0, tokens=0)
    assert row_weights(spec, torch.tensor([2, 0]), none).tolist() == [0.0, 0.0]


def test_constant_average_accepts_a_fractional_length():
    weights = average.constant(torch.tensor([3]), Counts(rows=3, filled_rows=1, turns=1, tokens=3), 2.5)
    assert_close(weights, torch.tensor([1 / 7.5]))
