"""A user's divergence: loaded, tried, checked at every call, and equal to the built-in one that it copies."""

from pathlib import Path

import pytest
import torch

from sdkit.language.errors import BadData
from sdkit.language.specs import Distillation, FileDivergence, ForwardKl, Table, VocabularySupport
from sdkit.losses.divergence import reverse_kl
from sdkit.user_code.divergences import UserDivergence, open_user_divergences

OK = Path(__file__).parent.parent / "ok"
REVERSE = """
def mine(student, teacher):
    absent = student.detach().exp() == 0
    s, t = student.masked_fill(absent, 0.0), teacher.masked_fill(absent, 0.0)
    return (student.exp() * (s - t)).sum(-1)
"""


def user_divergence(folder, body=REVERSE, **options):
    (folder / "mine.py").write_text(body)
    return UserDivergence(FileDivergence(file="mine.py", function="mine", **options), folder)


def term(divergence):
    return Distillation(divergence=divergence, support=VocabularySupport())


def test_copy_of_the_reverse_kl_equals_the_reverse_kl(tmp_path):
    function = user_divergence(tmp_path)
    function.try_out()
    student, teacher = torch.randn(2, 4, 9).log_softmax(-1)
    assert torch.equal(function(student, teacher), reverse_kl(student, teacher))


def test_all_faults_are_reported_together(tmp_path):
    body = "def mine(student, teacher):\n    return student.sum(-1) + 1\n"
    with pytest.raises(BadData, match=r"mine in mine\.py .*neither side has.*; is not 0 where"):
        user_divergence(tmp_path, body).try_out()


def test_error_points_at_the_line(tmp_path):
    function = user_divergence(tmp_path, "def mine(student, teacher):\n    return student[:, 99]\n")
    with pytest.raises(BadData, match="mine failed: IndexError") as caught:
        function.try_out()
    assert str(caught.value.place) == "mine.py:2:1"


@pytest.mark.parametrize(("body", "returned"), [("student", r"\[4, 9\]"), ("None", "NoneType")])
def test_wrong_result_during_training_is_refused(tmp_path, body, returned):
    function = user_divergence(tmp_path, f"def mine(student, teacher):\n    return {body}\n")
    with pytest.raises(BadData, match=rf"returned {returned}, not a tensor \[4\]"):
        function(torch.zeros(4, 9), torch.zeros(4, 9))


def test_only_terms_with_a_file_have_a_user_divergence(tmp_path):
    assert open_user_divergences(Table({"distil": term(ForwardKl())}), tmp_path) == {}
    losses = {
        name: term(FileDivergence(file="diverge.py", function=name)) for name in ("total_variation", "symmetric")
    }
    assert open_user_divergences(Table(losses), OK).keys() == losses.keys()
