"""Find the encoder among a file's tensors, whatever wraps it and whatever lies beside it.

A wrapper is any prefix, in any order and depth, of names or of dictionaries: ``module.``, ``_orig_mod.``, ``model.``,
``state_dict``, ... . The encoder begins where the patch embedding is.
"""

import re
from dataclasses import dataclass, field

from torch import Tensor

from tinymim.errors import CheckpointError

State = dict[str, Tensor]
Found = list[tuple[str, str, Tensor]]  # see weight_files.walk
MOST, LONGEST = 100_000, 400  # tensors of a file, characters of a name
WRAPPER = re.compile(  # added by DistributedDataParallel, torch.compile, FSDP and checkpointing, anywhere in a name
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
EMBEDDING = re.compile(r"((?:[^.]+\.)*?)(?:patch_embed|embeddings\.patch_embeddings)\.")
BLOCK = re.compile(r"((?:[^.]+\.)*?)(?:blocks|layers|layer|stages)\.\d+\.")
WORDS = re.compile(r"[._]")
AVERAGED = {
    "ema",
    "avg",
    "averaged",
    "swa",
    "shadow",
    "momentum",
    "target",
    "k",
}  # model_ema, target_encoder, encoder_k
TEACHER, STUDENT = {"teacher", "tch"}, {"student"}
OTHERS = {"decoder", "head", "neck", "predictor", "optimizer", "loss"}  # parts beside an encoder that have blocks, too
CONTAINERS = ("state_dict.", "model.", "model_state.", "model_state_dict.", "", "backbone.", "encoder.", "net.")


@dataclass
class Encoder:
    """Tensors under the encoder's own names, those beside it, and what to say about the choice."""

    state: State
    beside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_encoder(found: Found, part: str | None = None, path: str = "FILE") -> Encoder:
    """The tensors of the encoder.

    Of several, the trained weights are chosen before their moving average; but of a student and a teacher of one shape
    (DINO, iBOT) the teacher, which is the one they publish.

    Args:
        found: Every tensor of the file.
        part: Start of the names that are wanted, e.g. "model_ema".
        path: The file, for notes.

    Raises:
        CheckpointError: no part of this name, two tensors of one name, or names that no program writes.
    """
    if len(found) > MOST:
        raise CheckpointError(f"{len(found):,} tensors in {path}", f"{MOST:,} at most", "give the weights alone")
    names: dict[str, tuple[str, Tensor]] = {}  # whole name -> name within its dictionary, tensor
    for place, key, value in found:
        if len(key) > LONGEST or not key.isprintable():
            raise CheckpointError(
                f"{path} has a tensor called {key[:40]!r}", "no program writes such names", "give another file"
            )
        name = WRAPPER.sub("", place + key)
        if name in names:
            raise CheckpointError(
                f"{path} has {name} twice",
                "without the prefixes of wrappers (module., _orig_mod.) two of its tensors have one name",
                "save model.state_dict() alone",
            )
        names[name] = (WRAPPER.sub("", key), value)
    roots = _roots(names, EMBEDDING) or _roots(names, BLOCK) or {_container(names): len(names)}
    if part is not None:
        roots = {root: count for root, count in roots.items() if root.startswith(part)}
        if not roots:
            raise CheckpointError(
                f"{path} has no encoder in {part!r}",
                f"it has {', '.join(sorted({name.split('.')[0] for name in names})[:8])}",
                "give the start of its tensors' names",
            )
    root, why = _choose(roots, names)
    inner = [other for other in roots if other != root and other.startswith(root)]
    state = {
        name.removeprefix(root): value
        for name, (_, value) in names.items()
        if name.startswith(root) and not name.startswith(tuple(inner))
    }
    place = next((name.removesuffix(key) for name, (key, _) in names.items() if name.startswith(root)), "")
    beside = [key for name, (key, _) in names.items() if name.startswith(place) and not name.startswith(root)]
    notes = []
    if others := [other.rstrip(".") or "the top level" for other in roots if other != root]:
        notes.append(
            f"the file holds {len(roots)} encoders; {root.rstrip('.') or 'the top level'} is loaded: {why}. For "
            f"{others[0]}: python -c \"import torch, tinymim.models as m; torch.save(m.read_checkpoint('{path}', "
            f"part='{others[0]}').state, 'other.pth')\""
        )
    elif AVERAGED & set(WORDS.split(root)):
        notes.append(f"these are averaged weights ({root.rstrip('.')}); the file has no others")
    return Encoder(state, beside, notes)


def _roots(names: dict[str, tuple[str, Tensor]], mark: re.Pattern[str]) -> dict[str, int]:
    """Prefix of each encoder -> number of its tensors."""
    roots = {found[1] for name in names if (found := mark.match(name))}
    own = {root for root in roots if not OTHERS & set(WORDS.split(root))}
    return {root: sum(name.startswith(root) for name in names) for root in sorted(own)}


def _container(names: dict[str, tuple[str, Tensor]]) -> str:
    """Where the tensors of a model without blocks lie."""
    places = {name.removesuffix(key) for name, (key, _) in names.items()}
    return next((place for place in CONTAINERS if place in places), min(places, default=""))


def _choose(roots: dict[str, int], names: dict[str, tuple[str, Tensor]]) -> tuple[str, str]:
    """The prefix to load, and why."""

    def only(pool: list[str], words: set[str]) -> list[str]:
        return [root for root in pool if words & set(WORDS.split(root))]

    def shapes(root: str) -> dict[str, tuple[int, ...]]:
        blocks = {n.removeprefix(root): tuple(v.shape) for n, (_, v) in names.items() if n.startswith(root)}
        return {n: shape for n, shape in blocks.items() if n.startswith(("blocks.", "patch_embed.", "cls_token"))}

    pool = sorted(roots, key=lambda root: (-roots[root], len(root)))
    averaged, why = only(pool, AVERAGED), "it has the most tensors"
    if averaged and len(averaged) < len(pool):
        pool, why = [root for root in pool if root not in averaged], "the trained weights, not their moving average"
    teachers, students = only(pool, TEACHER), only(pool, STUDENT)
    if teachers and students and shapes(teachers[0]) == shapes(students[0]):
        return teachers[0], "the average of the student, which methods like DINO publish"
    if teachers and len(teachers) < len(pool):
        pool, why = [root for root in pool if root not in teachers], "the trained model, not its teacher"
    return pool[0], why
