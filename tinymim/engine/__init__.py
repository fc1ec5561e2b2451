"""Recipe -> MMEngine Runner: loops, hooks, schedules, exact resume."""

from tinymim.engine.chain import ChainResult, distill_chain
from tinymim.engine.evaluate import ClassifierScores, evaluate_classifier
from tinymim.engine.finetuning import FinetuneResult, finetune
from tinymim.engine.recipe import learning_rate, load_recipe, recipe_names
from tinymim.engine.run import RunResult, distill, pretrain

__all__ = [
    "ChainResult",
    "ClassifierScores",
    "FinetuneResult",
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
