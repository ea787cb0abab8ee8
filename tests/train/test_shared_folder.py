"""Ranks that have different run directories find out at the start of a run."""

import pytest

from sdkit.distributed import collectives
from sdkit.language.errors import BadEnvironment
from sdkit.train import shared_folder
from sdkit.train.shared_folder import check_shared


@pytest.fixture
def ranks(monkeypatch):
    """Sets which rank of two this is, and on which node the other one saw no file of the first."""

    def pretend(rank, blind=None):
        monkeypatch.setattr(collectives, "rank", lambda: rank)
        monkeypatch.setattr(collectives, "all_gather_object", lambda own: [own, blind])

    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "broadcast_object", lambda value: "token")
    monkeypatch.setattr(collectives, "barrier", lambda: None)
    monkeypatch.setattr(shared_folder, "WAIT_SECONDS", 0.2)
    return pretend


def test_shared_folder_is_left_as_it_was(ranks, tmp_path):
    ranks(0)
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".shared-token").touch()  # by the first rank
    ranks(1)
    check_shared(tmp_path)


def test_every_rank_names_the_node_with_another_folder(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder.socket, "gethostname", lambda: "node-b")
    ranks(1)
    with pytest.raises(BadEnvironment, match="is another folder on node-b") as caught:
        check_shared(tmp_path)  # in which the first rank has written nothing
    assert "--to or output.folder" in caught.value.hint
    ranks(0, blind="node-c")
    with pytest.raises(BadEnvironment, match="is another folder on node-c"):
        check_shared(tmp_path)


def test_one_rank_needs_no_check(process_group, tmp_path):
    check_shared(tmp_path / "missing")
