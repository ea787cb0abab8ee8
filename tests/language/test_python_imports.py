"""Which modules a user's file imports, found without running it; and that the file can import those beside it."""

import sys

import pytest

from sdkit.language.python_imports import with_imports
from sdkit.language.user_functions import UserFunction, module_search_path


@pytest.fixture
def write(tmp_path):
    """Writes Python files below the test's folder; returns the path of the first."""

    def write_files(**files):
        paths = [tmp_path / f"{name.replace('__', '/')}.py" for name in files]
        for path, text in zip(paths, files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return paths[0]

    return write_files


def names(file, search=()):
    folder = file.parent
    return [str(path.relative_to(folder)) for path in with_imports([file], [*search, folder])]


def test_modules_are_followed_at_any_depth(write):
    entry = write(entry="import one", one="from two import f", two="f = 1", other="")
    assert names(entry) == ["entry.py", "one.py", "two.py"]


def test_imports_anywhere_in_the_file_count(write):
    entry = write(
        entry="def f():\n    import one\ntry:\n    import two\nexcept ImportError:\n    pass", one="", two=""
    )
    assert names(entry) == ["entry.py", "one.py", "two.py"]


def test_packages_and_relative_imports(write):
    """`import pkg.deep.leaf` runs each package's __init__; `from` may name a module."""
    write(
        pkg__init="", pkg__deep__leaf="from .. import side\nfrom .near import x", pkg__side="", pkg__deep__near="x = 1"
    )
    entry = write(entry="import pkg.deep.leaf", second="from pkg import side, missing")
    (entry.parent / "pkg/__init__.py").write_text("")
    expected = ["entry.py", "pkg/__init__.py", "pkg/deep/leaf.py", "pkg/deep/near.py", "pkg/side.py"]
    assert names(entry) == expected  # pkg/deep is a package without __init__
    assert names(entry.with_name("second.py")) == ["pkg/__init__.py", "pkg/side.py", "second.py"]


def test_libraries_and_sdkit_are_left_out(write):
    entry = write(entry="import json, attrs, torch.nn\nfrom sdkit.language import specs")
    assert with_imports([entry], [*map(type(entry), sys.path), entry.parent]) == [entry]


def test_modules_that_import_each_other_end(write):
    assert names(write(entry="import one", one="import entry, one")) == ["entry.py", "one.py"]


def test_broken_module_is_listed_but_not_followed(write):
    assert names(write(entry="import one", one="import two\n(", two="")) == ["entry.py", "one.py"]


def test_first_folder_of_the_search_path_wins(write, tmp_path):
    entry = write(entry="import one", one="", early__one="")
    assert with_imports([entry], [tmp_path / "early", tmp_path]) == [tmp_path / "early/one.py", entry]


def test_function_can_use_modules_beside_its_file(write, monkeypatch):
    """At the top of the file and inside functions; an installed module of the same name wins."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    entry = write(
        entry="import beside_top\nimport json\ndef f():\n    import beside_late\n    return beside_top.X + beside_late.X + json.dumps(1)",
        beside_top="X = 'a'",
        beside_late="X = 'b'",
        json="raise ValueError",
    )
    assert UserFunction("entry.py", "f", entry.parent).call() == "ab1"
    assert module_search_path([entry]) == sys.path
