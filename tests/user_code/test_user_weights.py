"""A user's weights: arguments, refused results, and the places of errors."""

import pytest
import torch

from sdkit.language.errors import BadData
from sdkit.language.specs import CrossEntropy, FileWeight, Table
from sdkit.language.user_functions import fault_of
from sdkit.user_code.token_weights import UserWeight, open_user_weights

COUNTS = torch.tensor([[True, True, False], [False, True, False]])
FEATURES = {
    "student_entropy": torch.tensor([[0.5, 1.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64),
    "reward": torch.tensor([1.0, 0.0], dtype=torch.float64),
}


def user_weight(folder, body, given=("student_entropy",), name="weigh", **changes):
    signature = ", ".join(["counts", *given])
    text = f"import torch\ncalls = []\ndef {name}({signature}):\n" + "".join(
        f"    {line}\n" for line in body.splitlines()
    )
    (folder / "mine.py").write_text(text)
    spec = FileWeight(file="mine.py", function=name, given=given, **changes)
    return UserWeight(spec, folder)


def test_function_gets_its_arguments_and_returns_weights(tmp_path):
    function = user_weight(tmp_path, "return student_entropy * (1 + reward[:, None])", ("student_entropy", "reward"))
    weights = function(COUNTS, FEATURES)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [[1.0, 2.0, 0.0], [0.0, 2.0, 0.0]]
    function.try_out()


def test_uncounted_tokens_have_weight_0(tmp_path):
    function = user_weight(tmp_path, "return torch.where(counts, 1.0, torch.nan)")
    assert function(COUNTS, FEATURES).tolist() == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert user_weight(tmp_path, "return counts")(COUNTS, FEATURES).tolist() == COUNTS.double().tolist()


def test_function_cannot_change_its_arguments(tmp_path):
    before = FEATURES["student_entropy"].clone()
    user_weight(tmp_path, "return student_entropy.add_(1)")(COUNTS, FEATURES)
    assert torch.equal(FEATURES["student_entropy"], before)


BAD_RESULTS = {
    "return student_entropy - 9": "returned -8.5 for rollout 0, token 0, not a tensor",
    "return student_entropy / 0": "returned inf for rollout 0, token 0",
    "return (student_entropy - student_entropy) / 0": "returned nan",
    "return student_entropy.sum(1)": r"returned a tensor \[2\], not a tensor \[2, 3\]",
    "return 1.0": "returned float, not a tensor",
    "return None": "returned NoneType",
    "return counts.to(torch.complex64)": "returned complex numbers",
}


@pytest.mark.parametrize(("body", "message"), BAD_RESULTS.items())
def test_result_that_is_no_weight_is_refused(tmp_path, body, message):
    with pytest.raises(BadData, match=f"weigh in mine.py {message}"):
        user_weight(tmp_path, body)(COUNTS, FEATURES)


def test_error_of_the_function_points_at_its_line(tmp_path):
    function = user_weight(tmp_path, "x = 1\nreturn counts[99]")
    with pytest.raises(BadData, match="weigh failed: IndexError") as caught:
        function(COUNTS, FEATURES)
    assert str(caught.value.place) == "mine.py:5:1"


def test_error_while_loading_points_at_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\nraise KeyError('no')\n")
    with pytest.raises(BadData, match=r"mine\.py cannot be loaded: KeyError") as caught:
        UserWeight(FileWeight(file="mine.py", function="weigh"), tmp_path)
    assert str(caught.value.place) == "mine.py:2:1"
    with pytest.raises(BadData, match=r"no file gone\.py"):
        UserWeight(FileWeight(file="gone.py", function="weigh"), tmp_path)


BAD_HABITS = {
    "return student_entropy / student_entropy.sum()": "when other rollouts are present",
    "return student_entropy / student_entropy.mean(1, keepdim=True).clamp(min=1e-9)": "depends on padding",
    "return torch.rand(counts.shape)": "when called again",
    "calls.append(0)\nreturn student_entropy * len(calls)": "when called again",
}


@pytest.mark.parametrize(("body", "message"), BAD_HABITS.items())
def test_dependence_on_other_rollouts_is_detected_before_training(tmp_path, body, message):
    function = user_weight(tmp_path, body)
    function(COUNTS, FEATURES)
    with pytest.raises(BadData, match=message):
        function.try_out()


def test_function_can_see_a_group_together(tmp_path):
    body = "return student_entropy / student_entropy.sum()"
    user_weight(tmp_path, body, rows="group").try_out()


def test_functions_of_all_terms_are_tried(tmp_path):
    user_weight(tmp_path, "return student_entropy")
    spec = FileWeight(file="mine.py", function="weigh", given=("student_entropy",))
    losses = Table({"a": CrossEntropy(weight=spec), "b": CrossEntropy()})
    assert list(open_user_weights(losses, tmp_path)) == ["a"]
    user_weight(tmp_path, "return -student_entropy")
    with pytest.raises(BadData, match="at least 0"):
        open_user_weights(losses, tmp_path)


SIGNATURES = [
    ("counts, a", ["a"], True),
    ("counts, *, a", ["a"], True),
    ("counts, a, b=1", ["a"], True),
    ("*args, a", ["a"], True),
    ("counts, **rest", ["a", "b"], True),
    ("counts, /, a", ["a"], True),
    ("counts", [], True),
    ("counts", ["a"], False),
    ("counts, a, b", ["a"], False),
    ("counts, *, a, b", ["a"], False),
    ("a", ["a"], False),
    ("counts, a, /", ["a"], False),
    ("", [], False),
    ("*, a", ["a"], False),
]


@pytest.mark.parametrize(("signature", "given", "fits"), SIGNATURES)
def test_signature_fits_if_python_could_call_it(tmp_path, signature, given, fits):
    path = tmp_path / "mine.py"
    path.write_text(f"def weigh({signature}): return 1\n")
    assert (fault_of(str(path), "mine.py", "weigh", ("counts",), given) is None) == fits
    space = {}
    exec(path.read_text(), space)
    try:
        space["weigh"](0, **dict.fromkeys(given, 0))
        called = True
    except TypeError:
        called = False
    assert called == fits


def test_file_that_cannot_be_read_is_a_fault(tmp_path):
    (tmp_path / "broken.py").write_text("def weigh(:\n")
    (tmp_path / "null.py").write_bytes(b"\0")
    faults = {
        name: fault_of(str(tmp_path / name), name, "weigh", ("counts",))
        for name in ("broken.py", "null.py", "gone.py", ".")
    }
    assert [fault[0] for fault in faults.values()] == ["file"] * 4
    assert "broken.py:1: " in faults["broken.py"][1]
    assert "is a folder" in faults["."][1]
