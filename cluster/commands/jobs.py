"""`tutelage submit` and `tutelage jobs`: runs as jobs of a cluster that is elsewhere."""

import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.session.interrupts import interrupted_as
from cluster.submission.package import Package, package_of, refuse_left_behind
from shared.config.file import in_stages, load_config
from shared.config.run import Config
from shared.errors import ConfigError, JobError

STOP_S = 300  # for the step under way and a checkpoint; Ray's own default is 3
STOP_POLL_S = 0.5
NOT_FOUND = 127  # what a shell makes of a program that is not there


def submit(
    path: Path,
    overrides: Sequence[str],
    *,
    address: str | None = None,
    detach: bool = False,
    fresh: bool = False,
) -> None:
    """`tutelage submit`: everything is checked that can be here, then the job's log follows."""
    config = load_config(path, overrides)
    package = package_of(Path.cwd(), config)
    name = _name_in(package, path)
    for one in (config, *in_stages(config).values()):
        refuse_left_behind(one, package)
    from cluster.submission.dashboard import STARTING_S, Dashboard

    dashboard = Dashboard(address, patience_s=STARTING_S)
    job = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    print(f"Dashboard  {dashboard.page(job)}\nPackage    {package.in_words()}", flush=True)
    words = ["tutelage", "run", name, *overrides, *(["--fresh"] if fresh else [])]
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "package.zip"
        package.write(packed)
        with interrupted_as(lambda: _may_be_sent(dashboard, job)):
            dashboard.submit(
                job,
                shlex.join(words),
                runtime_env={
                    "working_dir": str(packed),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
                },
                metadata=_described(config),
            )
    print(f"Job        {job}", flush=True)
    if detach:
        print(_how_to_go_on(dashboard, job))
    else:
        _follow(dashboard, job)


def ls(*, address: str | None = None) -> None:
    """`tutelage jobs ls`: a line per job, the newest last."""
    from cluster.submission.dashboard import Dashboard

    dashboard = Dashboard(address)
    found = dashboard.jobs()
    if not found:
        print(f"No job was submitted to {dashboard.url}; `tutelage submit CONFIG` submits one")
        return
    width = max(len("job"), *(len(job.submission_id) for job in found))
    print(f"{'job':<{width}}  {'status':<9}  {'began':<19}  {'took':>9}  what")
    for job in found:
        print(
            f"{job.submission_id:<{width}}  {job.status.value.lower():<9}  "
            f"{_moment(job.start_time):<19}  {_length(job):>9}  {_what(job)}"
        )


def logs(job: str, *, address: str | None = None, follow: bool = False) -> None:
    """`tutelage jobs logs`."""
    from cluster.submission.dashboard import Dashboard

    dashboard = Dashboard(address)
    dashboard.job(job)
    if follow:
        _follow(dashboard, job)
    else:
        print(dashboard.log(job), end="", flush=True)


def stop(job: str, *, address: str | None = None) -> None:
    """`tutelage jobs stop`: ends the job as SIGTERM ends the command in it."""
    from cluster.submission.dashboard import Dashboard

    dashboard = Dashboard(address)
    found = dashboard.job(job)
    if found.status.is_terminal():
        print(f"{job} has ended before: {found.status.value.lower()}")
        return
    with interrupted_as(lambda: _ends_alone(dashboard, job)):
        dashboard.stop(job)
        print("the step under way is saved first", flush=True)
        while not (found := dashboard.job(job)).status.is_terminal():
            time.sleep(STOP_POLL_S)
    print(f"{job} is {found.status.value.lower()}; the same config submitted again goes on")


def _name_in(package: Package, config: Path) -> str:
    """The config's path in a package. Raises ConfigError for one that is not in it."""
    whole = config.resolve()
    name = str(whole.relative_to(package.folder)) if package.folder in whole.parents else ""
    if name not in package.files:
        raise ConfigError(
            f"the config {config} is not among what the job takes along, which is "
            f"{package.folder} without what its .gitignore names; submit from a folder that holds "
            "the config"
        )
    return name


def _described(config: Config) -> Mapping[str, str]:
    """What the Jobs tab shows of a run."""
    teachers = ", ".join(Path(teacher.model).name for teacher in config.teachers.values())
    student = Path(config.student.model).name
    return {
        "run": config.name,
        "teacher": teachers,
        "student": student,
        "steps": str(config.steps),
    }


def _how_to_go_on(dashboard: Any, job: str) -> str:
    return (
        f"The job goes on without this command. Follow it: {dashboard.command('logs', job)} "
        f"--follow; stop it: {dashboard.command('stop', job)}"
    )


def _may_be_sent(dashboard: Any, job: str) -> str:
    return (
        f"Interrupted; `{dashboard.command('ls')}` says whether {job} is there by now. If not, the "
        "same command submits it."
    )


def _ends_alone(dashboard: Any, job: str) -> str:
    return (
        f"Interrupted; a job that was told to stop saves its step and ends without this command. "
        f"`{dashboard.command('ls')}` shows {job}, and the same command waits for it again."
    )


def _follow(dashboard: Any, job: str) -> None:
    """Print a job's log until it ends; an interruption leaves the job alone. Raises JobError for
    one that did not succeed."""
    with interrupted_as(lambda: _how_to_go_on(dashboard, job)):
        from cluster.submission.following import follow  # a moment, and the job is there already

        found = follow(dashboard, job)
    if found.status.value == "SUCCEEDED":
        return
    if found.driver_exit_code == NOT_FOUND:
        raise JobError(
            f"the head of {dashboard.url} has no program `tutelage`; install the same version "
            "there, in the environment from which `ray start` is called"
        )
    if found.status.value == "STOPPED":
        raise JobError(f"the job {job} was stopped; the same config submitted again goes on")
    if found.driver_exit_code is None:
        said = (found.message or "it says no reason").strip().splitlines()[0].rstrip(".")
        raise JobError(f"the job {job} did not start or was killed: {said}")
    if found.driver_exit_code < 0:
        raise JobError(
            f"the job {job} was killed by signal {-found.driver_exit_code}, as by a machine short "
            "of memory; the same config submitted again goes on"
        )
    raise JobError(
        f"the job {job} failed with exit code {found.driver_exit_code}; its log says why",
        exit_code=found.driver_exit_code,
    )


def _moment(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))


def _length(job: Any) -> str:
    """How long a job took, or has taken so far."""
    if job.start_time is None:
        return "-"
    seconds = round((job.end_time or 1000 * time.time()) / 1000 - job.start_time / 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _what(job: Any) -> str:
    """A run of ours, or the command of somebody else's job."""
    known = job.metadata or {}
    if not {"teacher", "student", "steps"} <= set(known):
        return job.entrypoint
    return f"{known['teacher']} -> {known['student']}, {known['steps']} steps"
