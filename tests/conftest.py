"""Fixtures for every test: a tiny model on disk, and the folder of real data sets."""

import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The suite is the same on a machine with GPUs: no process of it sees them.
os.environ |= {"SDKIT_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
os.environ.pop("COLUMNS", None)  # what commands print is as wide as on a machine without a terminal

import pytest
from tinyruns import make_spec
from warm import WarmProcess

from sdkit.batches import Row

LONGEST_FILES = (
    "test_resume.py",
    "test_docs.py",
    "test_accelerator.py",
    "test_guarantee.py",
    "test_guaranteed_runs.py",
    "test_launch.py",
    "test_cli.py",
    "test_serve_vllm.py",
    "test_ranks.py",
    "test_faults.py",
    "test_vllm.py",
    "test_convert.py",
    "test_prefetch.py",
    "test_served_vllm.py",
)


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that all workers end at about the same time."""
    order = {name: i for i, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random Llama with its tokenizer, in Hugging Face format."""
    from sdkit.models import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory):
    """The tiny model with other random weights."""
    from sdkit.models import tiny

    return tiny.build(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="session")
def warm():
    """Runs commands in forks of a process that has already imported the heavy libraries."""
    process = WarmProcess()
    yield process
    process.close()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def real_data():
    """The folder with real data sets."""
    folder = os.environ.get("SDKIT_TEST_DATA")
    if not folder:
        pytest.skip("SDKIT_TEST_DATA names no folder with sciknoweval/ and tooluse/")
    return Path(folder)


@pytest.fixture(scope="session")
def _stop_process_group():
    yield
    from sdkit.distributed import zero

    zero.stop()


@pytest.fixture
def process_group(_stop_process_group):
    """DeepSpeed's process group of one.  A complete run leaves it, so each test joins again if needed."""
    from sdkit.distributed import zero

    zero.start()


@pytest.fixture
def open_tiny(tiny_folder, process_group, tmp_path):
    """Opens a trainer from changes to the small run; closes it at the end of the test."""
    from sdkit.train.run import open_run

    trainers = []

    def open_trainer(spec=None, **changes):
        trainers.append(open_run(spec or make_spec(tiny_folder, **changes), tmp_path))
        return trainers[-1]

    yield open_trainer
    for trainer in trainers:
        trainer.close()


@pytest.fixture(scope="session")
def plain_tokenizer(tiny_tokenizer):
    """The tiny tokenizer without a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="session")
def switching_tokenizer(tiny_tokenizer):
    """The tiny tokenizer; its generation prompt closes the thinking unless the system message says /think."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    closed = "{% if '/think' not in messages[0]['content'] %}<think></think>{% endif %}"
    invite = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(invite, invite + closed)
    assert closed in tokenizer.chat_template
    return tokenizer


@pytest.fixture
def sdkit(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, standard output and standard error."""
    from sdkit.cli import main

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sdkit", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def make_row():
    """Makes a row from a prompt and columns; `before` are the messages before the prompt."""

    def make(prompt="What is 2 + 2?", index=0, before=(), **columns):
        messages = (*before, {"role": "user", "content": prompt})
        columns = {"prompt": prompt, **columns}
        return Row(index=index, messages=messages, columns=columns, raw=columns)

    return make
