"""The command blocks of the documents, typed as they stand by a user on this machine."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.jobs import write_job
from tests.documents import ROOT, CommandBlock, command_blocks
from tests.drills.commands import Home
from tests.drills.nodes import start_head

pytestmark = pytest.mark.drill


def blocks_with(*programs: str, document: str = "README.md") -> list[CommandBlock]:
    """The blocks of a document that call nothing else."""
    return [
        block
        for block in command_blocks()
        if block.document == ROOT / document and block.programs <= set(programs)
    ]


@pytest.fixture
def folder(home: Home, tiny_pair, monkeypatch) -> Path:
    """A user's own folder with a small job in it."""
    folder = home.folder / "work"
    folder.mkdir()
    path = write_job(folder, tiny_pair, steps=4, mixture={"policy": "fixed"})
    shutil.copy(path, folder / "my.yaml")
    return folder


def typed(home: Home, folder: Path, words: tuple[str, ...], **variables: str) -> str:
    """Run one line in a folder and return what it said."""
    script = f'cd {folder} && exec "$@"'
    return home._end(home.execute("bash", "-c", script, "bash", *words, **variables), 0)


def replaced(word: str, there: Mapping[str, str]) -> str:
    """A word with what differs on this machine."""
    for name, value in there.items():
        word = word.replace(name, value)
    return word


def test_a_pair_of_ones_own_as_the_readme_says(home, folder):
    (block,) = [b for b in blocks_with("tutelage") if b.commands[0][1] == "init"]
    mine = (folder / "my.yaml").read_text()
    (folder / "my.yaml").unlink()
    for words in block.commands:
        said = typed(home, folder, words)
        (folder / "my.yaml").write_text(mine)  # models and text of one's own
    assert "Validation text" in said
    assert (folder / "runs" / "job" / "export" / "config.json").exists()


def test_a_day_on_a_cluster_as_the_readme_says(home, folder, monkeypatch):
    from ray._private.services import get_node_ip_address

    head, variables = get_node_ip_address(), {}
    shown = [b for b in blocks_with("export", "ray", "tutelage") if b.commands[0][1] != "init"]
    assert [b.commands[0][0] for b in shown] == ["export", "ray", "tutelage", "tutelage"]
    for block in shown:
        for words in block.commands:
            if words[0] == "export":
                variables |= dict(word.split("=") for word in words[1:])
                continue
            mine = tuple(replaced(word, {"HEAD": head}) for word in words)
            said = typed(home, folder, mine, **variables)
    assert (folder / "runs" / "job" / "summary.json").exists()
    assert "is stopped" in said
    assert os.path.exists(home.folder / ".ray" / "auth_token")


def test_a_job_as_the_documents_of_clusters_say(home, folder):
    shown = blocks_with("export", "tutelage", document="cluster/README.md")
    (block,) = [b for b in shown if "export" in b.programs]
    there = {"http://HEAD:8265": start_head(home).dashboard}
    variables: dict[str, str] = {}
    for words in block.commands:
        mine = tuple(replaced(word, there) for word in words)
        if words[0] == "export":
            variables |= dict(word.split("=", 1) for word in mine[1:])
            continue
        said = typed(home, folder, mine, **variables)
        if found := re.search(r"^Job +(\S+)$", said, re.M):
            there["ID"] = found[1]
    assert "has ended before: succeeded" in said
    assert (folder / "runs" / "job" / "summary.json").exists()


def block_of(verb: str) -> CommandBlock:
    """The block of the documents of clusters that begins with a verb."""
    shown = blocks_with("tutelage", document="cluster/README.md")
    (block,) = [found for found in shown if found.commands[0][1] == verb]
    return block


def test_the_head_is_watched_as_the_documents_say(home, folder):
    head = start_head(home)
    for words in block_of("monitor").commands:
        said = typed(home, folder, words, RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
    (config,) = re.findall(r"--config\.file=(\S+)", said)
    assert Path(config).exists()


def test_a_cluster_to_submit_to_as_the_documents_say(home, folder):
    for words in block_of("manifests").commands:
        said = typed(home, folder, words)
    assert "manifests/raycluster.yaml: " in said
    assert (folder / "manifests" / "raycluster.yaml").exists()
