"""A signal at any moment of any command that uses Ray: exit code 1 and a sentence, nothing is left
over, and the same command goes on. `run` and `plan --probe` are in `test_signals.py`, commands of
jobs in `test_jobs.py`."""

import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.active.folder import ActiveDir
from cluster.session.interrupts import SAME_S, UNSAVED
from shared.run.run_dir import RunDir, locked
from tests.cluster.active.scripted import active_job
from tests.cluster.active.test_elad import ELAD
from tests.cluster.commands.test_prompts import PROMPT_SEARCH
from tests.drills.commands import NOT_OURS, Command, Home, heard, reached, titled, wait_until
from tests.drills.conftest import STEPS, Job
from tests.tiny import Pair, edit_config

pytestmark = pytest.mark.drill

PATIENCE_S = 120.0
SAVED = (
    rf"Stopped after step \d+ of {STEPS}, which is saved; "
    r"the same command continues from there\."
)
CONTINUES = r"Interrupted; the same command continues .*\."
TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT

Come = Callable[[Command], bool]


@dataclass(frozen=True)
class Moment:
    """When a command gets signals, one a second, alone or with all that it has started."""

    come: Come
    says: str  # a pattern of its last line
    numbers: tuple[int, ...] = (TERM,)
    group: bool = False


@dataclass(frozen=True)
class Scene:
    """A user's home and a folder, the commands' temporary files in `scratch`."""

    home: Home
    folder: Path
    scratch: Path

    def start(self, *words: str) -> Command:
        return self.home.start(*words, TMPDIR=str(self.scratch))

    def works(self, *titles: str) -> Come:
        """A moment: actors of one of these classes are there."""
        return lambda command: bool(titled(self.home.processes(), *titles))


@pytest.fixture
def scene(home: Home, tmp_path: Path) -> Iterator[Scene]:
    home.working = tmp_path
    scratch = Path(tempfile.mkdtemp(prefix="t-"))  # a short path, as those of sockets must be
    yield Scene(home, tmp_path, scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def connecting(command: Command) -> bool:
    """Ray's head is coming up."""
    return any(process.name() == "gcs_server" for process in command.family())


def after(seconds: float) -> Come:
    began = time.monotonic()
    return lambda command: time.monotonic() - began > seconds


def interrupt(command: Command, moment: Moment) -> None:
    """Send the signals of a moment, the next ones only while the command has not ended."""
    for number in moment.numbers:
        for process in command.family() if moment.group else [command.process]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        with suppress(Exception):
            command.wait(SAME_S + 0.2)
        if not command.running:
            return


def files_left(scene: Scene) -> list[str]:
    """Files that are written in part, owners of runs, and temporary ones."""
    found = [*scene.folder.rglob(".*"), *scene.folder.rglob("*.partial*"), *scene.scratch.iterdir()]
    marks = (".draft", ".owner", ".partial")
    left = [p for p in found if p.parent == scene.scratch or any(m in p.name for m in marks)]
    return [str(p) for p in left if not p.name.startswith("torchinductor")]  # torch's own cache


def goes_through(scene: Scene, words: tuple[str, ...], moments: list[Moment]) -> str:
    """Interrupt a command at each of its moments, and let it end; returns what it said last."""
    before = {process.pid for process in scene.home.processes()}
    files = set(files_left(scene))  # of a head that is up already
    for moment in moments:
        command = scene.start(*words)
        wait_until(lambda: moment.come(command), doing=command)  # noqa: B023
        interrupt(command, moment)
        assert command.wait(PATIENCE_S) == 1, command.output
        said = command.output.strip().splitlines()
        assert re.fullmatch(moment.says, said[-1]), command.output
        assert not NOT_OURS.search(command.output), command.output
        wait_until(lambda: {p.pid for p in scene.home.processes()} <= before, patience_s=PATIENCE_S)
        assert set(files_left(scene)) <= files
    return scene.home.run(*words, TMPDIR=str(scene.scratch))


def private(scene: Scene, says: str, *titles: str, work: Come | None = None) -> list[Moment]:
    """The moments of a command on a cluster of its own, which is at work once one of these actors
    is there, or later."""
    work = work or scene.works(*titles)
    return [
        Moment(heard, re.escape(UNSAVED)),
        Moment(connecting, says, (HUP,), group=True),
        Moment(work, says, (TERM,), group=True),
        Moment(work, says, (INT, TERM)),
    ]


def test_a_capture(scene, config):
    words = ("capture", str(config), f"targets.store={scene.folder}/store", "steps=4")
    said = "Interrupted; what was answered is stored, and the same command goes on."
    goes_through(scene, words, private(scene, re.escape(said), "TeacherReplica"))


def test_a_selftest(scene, config):
    words = ("selftest", str(config))
    said = goes_through(scene, words, private(scene, re.escape(UNSAVED), "TeacherReplica"))
    assert "All is well" in said
    assert list((config.parent / "cache" / "selftest").iterdir()) == []


def test_a_search_for_prompts(scene, config):
    options = (f"prompt_search.{name}={value}" for name, value in PROMPT_SEARCH.items())
    left_out = ("prompt_search.to", "prompt_search.instructions")
    options = tuple(one for one in options if not one.startswith(left_out))
    to = f"prompt_search.to={scene.folder}/found.json"
    said = "Interrupted; the scores so far are kept, and the same command goes on."
    moments = private(
        scene, re.escape(said), work=lambda command: "letters, round 0" in command.output
    )
    goes_through(scene, ("prompts", "optimise", str(config), to, *options), moments)


def test_rounds(scene, tiny_pair: Pair):
    teacher = shutil.copytree(tiny_pair.teacher, scene.folder / "reads")
    edit_config(teacher, max_position_embeddings=1024)
    asked = {"answer_marker": "a", "train_prompts": 3, "validation_prompts": 3, "patience": 1}
    job = active_job(
        scene.folder,
        tiny_pair,
        active=ELAD | asked | {"sample_temperature": 0},
        teachers={"tiny": {"model": str(teacher), "cpus": 0.5}},
        steps=STEPS,
        log_every=1,
    )
    first = ActiveDir(scene.folder / "runs" / "rounds").round(0).run.path
    kept = r"Interrupted; what is done is kept, and the same command goes on\."
    trained = reached(first, 5)
    moments = [
        *private(scene, kept, "TeacherReplica")[:3],
        Moment(lambda _: trained(), SAVED, (HUP,), group=True),
        Moment(lambda _: first.joinpath("export").exists(), f"{kept}|{CONTINUES}", (TERM, INT)),
    ]
    assert "The student is sure" in goes_through(scene, ("active", str(job)), moments)


def a_copy(job: Job, folder: Path) -> Path:
    """The run that nobody disturbed, to be looked at from here."""
    return shutil.copytree(job.reference, folder / "runs" / "job")


def test_an_evaluation(scene, job):
    run = a_copy(job, scene.folder)
    moments = private(scene, re.escape(UNSAVED), "RayTrainWorker")
    said = goes_through(scene, ("eval", str(run)), moments)
    assert f"Numbers   {run}/eval.json" in said


def test_an_export(scene, job):
    run = a_copy(job, scene.folder)
    shutil.rmtree(run / "export")
    drafted = (run / ".export.draft").exists
    to = scene.folder / "out"
    moments = [
        Moment(come, re.escape(UNSAVED), numbers, group)
        for come, numbers, group in (
            (heard, (TERM,), False),
            (lambda _: drafted(), (TERM,), False),
            (lambda _: drafted(), (HUP,), True),
            (lambda _: drafted(), (INT, TERM), False),
        )
    ]
    goes_through(scene, ("export", str(run), "--to", str(to)), moments)
    assert (to / "model.safetensors").exists()


def test_a_view_of_a_run(scene, job):
    run = a_copy(job, scene.folder)
    said = re.escape("Interrupted; the run is not, and the same command watches it again.")
    shown: Come = lambda command: f"step {STEPS}" in command.output  # noqa: E731
    moments = [Moment(shown, said, numbers) for numbers in ((TERM,), (HUP,), (INT,))]
    with locked(RunDir(run)):
        owned = scene.folder / "runs" / ".job.owner"
        for moment in moments:
            watching = scene.start("status", str(run), "--watch")
            wait_until(lambda: moment.come(watching), doing=watching)  # noqa: B023
            interrupt(watching, moment)
            assert watching.wait(PATIENCE_S) == 1, watching.output
            assert re.fullmatch(said, watching.output.strip().splitlines()[-1])
            assert not NOT_OURS.search(watching.output)
            assert owned.exists()


def test_a_service_and_training_on_it(scene, config):
    said = re.escape("Interrupted; the same command starts what does not serve yet.")

    def starts(command: Command) -> bool:
        return any("gcs_server" in " ".join(p.cmdline()[:1]) for p in scene.home.processes())

    works = scene.works("TeacherReplica")
    moments = [
        Moment(heard, re.escape(UNSAVED)),
        Moment(starts, said),
        Moment(works, said, (TERM,), group=True),
        Moment(works, said, (HUP, INT)),
    ]
    goes_through(scene, ("teacher", "up", str(config)), moments)

    runs = scene.folder / "runs"
    trained, ended = reached(runs / "job", 13), reached(runs / "job", STEPS)
    moments = [
        Moment(heard, re.escape(UNSAVED)),
        Moment(after(2.5), f"{re.escape(UNSAVED)}|{CONTINUES}"),
        Moment(scene.works("RayTrainWorker"), CONTINUES, (TERM,), group=True),
        Moment(lambda _: trained(), SAVED, (HUP,), group=False),
        Moment(lambda _: ended(), f"{CONTINUES}|{SAVED}", (TERM, INT)),
    ]
    goes_through(scene, ("train", str(config), f"paths.runs={runs}"), moments)
    assert "is stopped" in scene.home.run("teacher", "down", TMPDIR=str(scene.scratch))
    scene.home.run("teacher", "down", "--all", TMPDIR=str(scene.scratch))
