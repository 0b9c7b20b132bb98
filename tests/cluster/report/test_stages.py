"""What a command says of the stages it goes through."""

import time

from cluster.report.stages import SENTENCES, begin, expect


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
