"""Recipe -> MMEngine Runner: jobs, hooks, schedules, exact resume. Names load on first use: options need no PyTorch."""

from typing import TYPE_CHECKING

from tinymim.lazy import lazy

if TYPE_CHECKING:
    from tinymim.engine.chain import ChainResult, distill_chain
    from tinymim.engine.evaluate import ClassifierScores, evaluate_classifier
    from tinymim.engine.finetuning import FinetuneJob, FinetuneResult, finetune
    from tinymim.engine.job import Job
    from tinymim.engine.jobs import JOBS
    from tinymim.engine.pretraining import DistillJob, PretrainJob, RunResult, distill, pretrain
    from tinymim.engine.recipe import learning_rate, load_recipe, recipe_names

_PLACES = {
    "JOBS": "jobs",
    "Job": "job",
    **dict.fromkeys(("ChainResult", "distill_chain"), "chain"),
    **dict.fromkeys(("ClassifierScores", "evaluate_classifier"), "evaluate"),
    **dict.fromkeys(("FinetuneJob", "FinetuneResult", "finetune"), "finetuning"),
    **dict.fromkeys(("DistillJob", "PretrainJob", "RunResult", "distill", "pretrain"), "pretraining"),
    **dict.fromkeys(("learning_rate", "load_recipe", "recipe_names"), "recipe"),
}
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
__getattr__ = lazy(__name__, _PLACES)
