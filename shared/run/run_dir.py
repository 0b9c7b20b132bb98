"""The run directory: what a run leaves behind, who may write to it, and what may continue it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from shared.config.file import dump, load_config
from shared.config.run import Config
from shared.errors import ConfigError, DamagedError, RunInUseError, StorageError, reason_of
from shared.prompts.prompts import read_prompts
from shared.run.changes import differing_options, in_words


def read_written(path: Path) -> dict:
    """The object in a JSON file of a run; empty if the file is absent. Raises DamagedError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise damaged(path, "it is no whole JSON object")
    return found


def damaged(path: Path, why: str) -> DamagedError:
    """The error for a file of a run that does not hold what was written."""
    return DamagedError(f"{path} is damaged: {why}; put a copy of it back, or remove it")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside `runs/<name>/`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def prompts(self) -> Path:
        """What the teacher is shown, as given."""
        return self.path / "prompts.json"

    @property
    def token_pair(self) -> Path:
        """Which tokens of teacher and student are the same bytes, where their tokenizers differ."""
        return self.path / "token_pair.npz"

    @property
    def rounds(self) -> Path:
        """The config of active teaching, where the folder is no run but holds rounds."""
        return self.path / "active.yaml"

    @property
    def stages(self) -> Path:
        """The folders of a run's stages but for the last, which is the run's own."""
        return self.path / "stages"

    @property
    def environment(self) -> Path:
        """Versions and platform."""
        return self.path / "environment.json"

    @property
    def text(self) -> Path:
        """What became of each domain's text."""
        return self.path / "text.json"

    @property
    def metrics(self) -> Path:
        """One line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """Event files of TensorBoard."""
        return self.path / "tensorboard"

    def documents(self, when: str) -> Path:
        """What an evaluation found in each document: `before`, `after`, or `latest` of a command's
        own."""
        return self.path / "documents" / f"{when}.arrow"

    @property
    def generations(self) -> Path:
        """What teacher and students wrote when they were evaluated last, a line for each prompt."""
        return self.path / "generations.jsonl"

    @property
    def trackers(self) -> Path:
        """By what trackers know the run again, and what they have got."""
        return self.path / "trackers"

    @property
    def weight_log(self) -> Path:
        """One line per decision of the controller."""
        return self.path / "weight_log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What a resume starts from."""
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """What the student wrote for the steps since the oldest checkpoint, before it learnt it."""
        return self.path / "rollouts"

    @property
    def teacher_texts(self) -> Path:
        """What teachers wrote to learn from, each text once."""
        return self.path / "teacher_texts"

    @property
    def modules(self) -> Path:
        """Versions of a teacher's modules that learn beside the student, which checkpoints
        name."""
        return self.path / "modules"

    @property
    def weights(self) -> Path:
        """Versions of the student's weights that its copies write with, while a command trains."""
        return self.path / "weights"

    @property
    def followed(self) -> Path:
        """Versions of the student's weights for a teacher that follows it, which checkpoints
        name."""
        return self.path / "followed"

    @property
    def export(self) -> Path:
        """The student as a plain Hugging Face or PEFT folder."""
        return self.path / "export"

    @property
    def merged(self) -> Path:
        """An adapted student as a whole model, its adapters merged into the base."""
        return self.path / "merged"

    @property
    def report(self) -> Path:
        """The page with plots."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """What other programs read."""
        return self.path / "summary.json"

    @property
    def baseline_summary(self) -> Path:
        """The copy trained on hard labels alone, beside the summary."""
        return self.path / "baseline.json"

    @property
    def baseline(self) -> "RunDir":
        """The run directory of the copy trained on hard labels alone."""
        return RunDir(self.path / "baseline")

    @property
    def logs(self) -> Path:
        """Logs of the driver and the workers."""
        return self.path / "logs"

    @property
    def start(self) -> Path:
        """What the start of the last command took, seconds by stage."""
        return self.logs / "start.json"

    @property
    def replicas(self) -> Path:
        """How many replicas the teachers have and what each does, while a command uses them."""
        return self.logs / "replicas.json"

    @property
    def rollout_replicas(self) -> Path:
        """The same of the student's copies that write."""
        return self.logs / "rollout_replicas.json"

    @property
    def scaling(self) -> Path:
        """One line per change of a teacher's number of replicas."""
        return self.logs / "scaling.jsonl"

    @property
    def workers(self) -> Path:
        """How many workers the student has, while a command trains it."""
        return self.logs / "workers.json"

    @property
    def progress(self) -> Path:
        """Progress lines, appended by rank 0 and tailed by the driver."""
        return self.logs / "progress.log"

    @property
    def stepping(self) -> Path:
        """There while rank 0 takes steps, after which it can save."""
        return self.logs / "stepping"

    @property
    def stop_request(self) -> Path:
        """Written by who wants training to save and end after the step under way."""
        return self.logs / "stop"

    @property
    def growth_request(self) -> Path:
        """There while workers shall end at their next checkpoint, to go on as more."""
        return self.logs / "grow"

    @property
    def finished(self) -> bool:
        """Whether the run's summary says so."""
        try:
            return read_written(self.summary).get("status") == "finished"
        except (OSError, DamagedError):
            return False

    @property
    def has_begun(self) -> bool:
        """Whether anything was measured or learnt, rather than merely asked for."""
        measured = self.metrics.exists() or (self.path / "evaluations.json").exists()
        return measured or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def recorded_config(self) -> Config:
        """The resolved config of the run. Raises ConfigError where there is none."""
        if not self.config.exists() and self.stages.is_dir():
            raise ConfigError(
                f"{self.path} is a run in stages whose last one has not begun; name the folder of "
                f"another, below {self.stages}"
            )
        if self.path.is_file():
            raise ConfigError(f"{self.path} is a file; name the folder of a run, as runs/NAME")
        if not self.config.exists():
            raise ConfigError(f"{self.path} holds no run: it has no config.yaml")
        return load_config(self.config)

    def new_attempt(self) -> Path:
        """A fresh `logs/attempt-N/`."""
        taken = [int(p.name.removeprefix("attempt-")) for p in self.logs.glob("attempt-*")]
        folder = self.logs / f"attempt-{max(taken, default=0) + 1}"
        folder.mkdir(parents=True)
        return folder


@contextmanager
def locked(run_dir: RunDir) -> Iterator[None]:
    """Hold the run directory; the operating system lets go when the process dies.

    Where no run began, nothing is left behind. Raises RunInUseError when another process holds it,
    and StorageError where no run can be written there.
    """
    lock = FileLock(run_dir.path.parent / f".{run_dir.path.name}.lock", timeout=0)
    owner = run_dir.path.parent / f".{run_dir.path.name}.owner"
    made = not run_dir.path.parent.exists()
    try:
        run_dir.path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = owner.read_text().strip() if owner.exists() else "another process"
        raise RunInUseError(
            f"the run {run_dir.path.name!r} is in use by {holder}; wait for it, stop it, "
            "or give this run another name"
        ) from None
    except OSError as error:
        raise StorageError(
            f"no run can be written to {run_dir.path.parent}: {reason_of(error)}; set paths.runs "
            "to a folder that you may write to"
        ) from None
    try:
        write_atomically(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        if not run_dir.path.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # not empty: a run began
                run_dir.path.parent.rmdir()


def open_run(config: Config, *, fresh: bool = False) -> RunDir:
    """The directory of a resolved config, new or to be continued; call it under `locked`.

    Raises ConfigError when a run of that name learnt something else, or from a teacher that was
    shown something else; `fresh` moves it aside.
    """
    run_dir = RunDir(Path(config.paths.runs) / config.name)
    prompts_id = _prompts_id(config.prompts)
    if fresh:
        move_aside(run_dir)
    if run_dir.rounds.exists():
        raise ConfigError(
            f"{run_dir.path} holds rounds of `tutelage active`; give this run another name, or "
            "pass --fresh to move them aside"
        )
    if run_dir.config.exists():
        found = differing_options(run_dir.recorded_config(), config)
        differing = [in_words(name, *values) for name, values in found.items()]
        if _prompts_id(run_dir.prompts if run_dir.prompts.exists() else None) != prompts_id:
            differing.append("prompts")
        if differing and not run_dir.has_begun:
            run_dir.weight_log.unlink(missing_ok=True)  # its opening entry was of the old config
        elif differing:
            raise ConfigError(
                f"the run {config.name!r} was started with other values of "
                f"{', '.join(differing)}; change them back, give this run another name, or pass "
                "--fresh to move the old one aside"
            )
    try:
        for folder in (run_dir.path, run_dir.logs, run_dir.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the run folder {run_dir.path} cannot be made: {reason_of(error)}; give the run "
            "another name, or set paths.runs to a folder that you may write to"
        ) from None
    write_atomically(run_dir.config, dump(config))
    if config.prompts is None:
        run_dir.prompts.unlink(missing_ok=True)
    else:
        write_atomically(run_dir.prompts, Path(config.prompts).read_text(encoding="utf-8"))
    return run_dir


def run_label(config: Config, run_dir: Path) -> str:
    """What metrics call a run: its name, and that of a run inside it, as a baseline is."""
    inside = "" if run_dir.name == config.name else f"/{run_dir.name}"
    return config.name + inside


def move_aside(run_dir: RunDir) -> Path | None:
    """Rename an existing run to the first free `<name>.old-N`; nothing is ever overwritten."""
    if not run_dir.path.exists() or not any(run_dir.path.iterdir()):
        return None
    number = 1
    while (target := run_dir.path.with_name(f"{run_dir.path.name}.old-{number}")).exists():
        number += 1
    run_dir.path.rename(target)
    return target


def append_progress(run_dir: RunDir, text: str) -> None:
    """A line for people, which the driver of a training prints. Raises OSError."""
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    with run_dir.progress.open("a") as file:
        file.write(text + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing. Raises StorageError when the disk does not take it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {reason_of(error)}; free some space, or name a folder that "
            "you may write to"
        ) from None
    finally:  # also after a signal
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _prompts_id(path: str | Path | None) -> str:
    return "" if path is None else read_prompts(path).id
