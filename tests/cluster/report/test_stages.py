"""What a command says of the stages it goes through."""

import subprocess
import sys
import time

from cluster.report.stages import SENTENCES, begin, expect
from tests.cluster.jobs import write_job

FIRST_LINE = """
import os, sys

class Output:
    def write(self, text):
        if text.strip():
            slow = {"torch", "ray", "transformers", "deepspeed"} & set(sys.modules)
            os.write(1, f"{text.strip()}|{sorted(slow)}".encode())
            os._exit(0)

    def flush(self): ...

sys.stdout = Output()
from cluster.cli import main
main(["run", sys.argv[1]])
"""


def test_a_baseline_takes_as_long_as_the_student_took(capsys):
    expect(["students", "baseline"])
    begin("students")
    assert capsys.readouterr().out == f"1 of 2: {SENTENCES['students']}\n"
    time.sleep(0.6)
    begin("baseline")
    said = "; about 1 s, as the student took"
    assert capsys.readouterr().out == f"2 of 2: {SENTENCES['baseline']}{said}\n"


def test_nothing_is_said_of_a_command_before(capsys):
    begin("students")
    expect(["baseline"])
    begin("baseline")
    assert capsys.readouterr().out.splitlines()[-1] == f"1 of 1: {SENTENCES['baseline']}"


def test_a_job_says_its_first_line_before_what_takes_seconds_to_import(tiny_pair, tmp_path):
    """Ray shows nothing of a job whose driver has printed nothing: it comes within 5 s."""
    command = [sys.executable, "-c", FIRST_LINE, str(write_job(tmp_path, tiny_pair))]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    line, _, slow = said.partition("|")
    assert line.startswith(f"1 of 2: {SENTENCES['start']}")
    assert slow == "[]"
