"""The jobs that test processes know by name."""

from tests.student_trainer.processes import job_train

JOBS = {"train": job_train}
