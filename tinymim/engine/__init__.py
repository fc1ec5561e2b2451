"""Recipe -> MMEngine Runner: jobs, hooks, schedules, exact resume."""

from tinymim.engine.chain import ChainResult, distill_chain
from tinymim.engine.evaluate import ClassifierScores, evaluate_classifier
from tinymim.engine.finetuning import FinetuneJob, FinetuneResult, finetune
from tinymim.engine.job import Job
from tinymim.engine.pretraining import DistillJob, PretrainJob, RunResult, distill, pretrain
from tinymim.engine.recipe import learning_rate, load_recipe, recipe_names

JOBS: dict[str, type[Job]] = {job.verb: job for job in (PretrainJob, DistillJob, FinetuneJob)}  # by command

__all__ = [
    "JOBS",
    "ChainResult",
    "ClassifierScores",
    "DistillJob",
    "FinetuneJob",
    "FinetuneResult",
    "Job",
    "PretrainJob",
    "RunResult",
    "distill",
    "distill_chain",
    "evaluate_classifier",
    "finetune",
    "learning_rate",
    "load_recipe",
    "pretrain",
    "recipe_names",
]
