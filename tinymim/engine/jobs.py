"""The jobs by their command."""

from tinymim.engine.finetuning import FinetuneJob
from tinymim.engine.job import Job
from tinymim.engine.pretraining import DistillJob, PretrainJob

JOBS: dict[str, type[Job]] = {job.verb: job for job in (PretrainJob, DistillJob, FinetuneJob)}
