"""Fixtures for every test: a tiny model on disk, and the folder of real data sets."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random Llama with its tokenizer, in Hugging Face format."""
    from sdkit.engine import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny") / "model")


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
