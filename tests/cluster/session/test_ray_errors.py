"""What Ray says of its own accord on a command's terminal."""

from typing import Any

from ray._private import worker

from cluster.session.ray_errors import in_one_line

LOST = "The node with node id: 1a2b and address: 10.0.0.7 and node name: 10.0.0.7 has been marked"
ENDED = "The autoscaler failed with the following error:\nTerminated with signal 15\n  File a.py"
FAILED = "The autoscaler failed with the following error:\nKeyError: 'head'"


def test_a_lost_node_is_a_line_and_the_end_of_a_head_none(monkeypatch, capsys):
    passed_on: list[str] = []

    def theirs(message: dict[str, Any], ignore_prefix: bool) -> None:
        passed_on.append("\n".join(message["lines"]))

    monkeypatch.setattr(worker, "print_to_stdstream", theirs)
    in_one_line()
    for text in (LOST, ENDED, FAILED):
        worker.print_to_stdstream({"lines": text.split("\n")}, False)
    assert capsys.readouterr().out == "the cluster lost the node 10.0.0.7\n"
    assert passed_on == [FAILED]
