"""Event files of TensorBoard: their records, what they replace, and that they stop nothing."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from shared.config.mixture import FixedMixture
from shared.run.metrics import DomainMetrics, StepMetrics
from student_trainer.tracking.tensorboard import EventFiles
from student_trainer.tracking.trackers import Trackers
from tests.cluster.run_dirs import controlled

CONFIG = controlled(FixedMixture(), domains=("code", "math"))


def line(step: int, loss: float) -> StepMetrics:
    domains = {"code": DomainMetrics(0.5, 8, 1, 0.75), "math": DomainMetrics(None, 0, 0, 0.25)}
    return StepMetrics(
        step=step,
        loss=loss,
        lr=0.1,
        grad_norm=1.0,
        tokens=8,
        captured_mass=None,
        domains=domains,
        seconds=2.0,
        compute_s=1.0,
    )


def events(file: Path) -> list[Event]:
    """What a file holds; every checksum is looked at."""
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        record, data = data[: size + 16], data[size + 16 :]
        assert struct.unpack("<I", record[8:12])[0] == masked_crc32c(record[:8])
        assert struct.unpack("<I", record[-4:])[0] == masked_crc32c(record[12:-4])
        found.append(Event.FromString(record[12:-4]))
    return found


def points(folder: Path, tag: str) -> dict[int, float]:
    """A curve as TensorBoard shows it: a session that starts takes out what it replaces."""
    curve: dict[int, float] = {}
    for file in sorted(folder.iterdir()):
        for event in events(file):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                curve = {step: value for step, value in curve.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == tag:
                    assert event.step not in curve, "shown twice"
                    curve[event.step] = value.simple_value
    return curve


def written(folder: Path, *, after: int, losses: dict[int, float]) -> list[str]:
    said: list[str] = []
    curves = Trackers(EventFiles(folder, after=after, tell=said.append))
    for step, loss in losses.items():
        curves.write(line(step, loss), CONFIG, steps_in_line=2)
    curves.close()
    return said


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path):
    written(tmp_path, after=0, losses={2: 3.0, 4: 2.5, 6: 9.0})
    written(tmp_path, after=4, losses={6: 2.0, 8: 1.5})
    assert points(tmp_path, "loss") == {2: 3.0, 4: 2.5, 6: 2.0, 8: 1.5}


def test_curves_have_the_numbers_of_the_line(tmp_path):
    written(tmp_path, after=0, losses={2: 3.0})
    assert points(tmp_path, "domain_kl/code") == {2: 0.5}
    assert points(tmp_path, "domain_kl/math") == {}
    assert points(tmp_path, "domain_weight/math") == {2: 0.25}
    assert points(tmp_path, "step_seconds") == {2: 1.0}
    assert points(tmp_path, "step_compute_seconds") == {2: 0.5}
    (file,) = tmp_path.iterdir()
    assert events(file)[0].file_version == "brain.Event:2"


def test_a_run_without_a_line_leaves_no_file(tmp_path):
    written(tmp_path / "tensorboard", after=0, losses={})
    assert not (tmp_path / "tensorboard").exists()


def test_what_cannot_be_written_is_said_once_and_stops_nothing(tmp_path):
    (tmp_path / "tensorboard").touch()
    (said,) = written(tmp_path / "tensorboard", after=0, losses={2: 3.0, 4: 2.5})
    assert "no further curves" in said
    assert "metrics.jsonl has the numbers" in said
