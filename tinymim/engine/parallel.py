"""Several processes: gradients are averaged (``ddp``), or weights and AdamW's moments are sharded as well (``fsdp``).

Only what is learned takes part. A frozen teacher is whole on every process; it is neither broadcast nor sharded.

``ddp`` is PyTorch's DistributedDataParallel in MMEngine's wrapper. ``fsdp`` is FSDP2 (``fully_shard``); MMEngine's own
strategy is FSDP1, so it is a wrapper of ours in the same place. A student is small beside its activations: weights stay
gathered until the backward pass, which makes one all-gather and one reduce-scatter a step, as many bytes as ddp's
all-reduce. Sources: arXiv 2006.15704 (DDP), 2304.11277 (FSDP), and the documentation of torch.distributed.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn

from tinymim.errors import ConfigError, TinyMIMError

STRATEGIES = (None, "ddp", "fsdp")  # of the recipe key ``strategy``; None: ddp
BUCKETS = 6  # at least as many all-reduces a step: only the last one cannot overlap with the backward pass
LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed? ?out|nccl|remote process", re.IGNORECASE)


def check_strategy(strategy: str | None, world: int) -> None:
    """Refuse a strategy that this number of processes cannot have.

    Raises:
        ConfigError: fsdp on one process.
    """
    if strategy == "fsdp" and world < 2:
        raise ConfigError(
            "strategy=fsdp on one process",
            "there is nobody to share weights and moments with",
            "start it with torchrun --nproc_per_node=N, or leave --strategy out",
        )


@MODEL_WRAPPERS.register_module()
class ShardedModel(nn.Module):
    """A model under FSDP2, where MMEngine expects a wrapper.

    Args:
        module: A ``BaseModel`` after :func:`shard_parts`.
        kept: A whole copy of its encoder, to be filled and saved; None: its state dict is saved.
    """

    def __init__(self, module: Any, kept: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module
        self.kept: list[Any] = [kept]  # a list, so that it is no sub-module: it has no part in training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """One pass; gradients are summed over processes, and weights sharded again, in the last one of a step only."""
        last = optim_wrapper.should_sync()
        self.module.set_requires_gradient_sync(last)
        self.module.set_reshard_after_backward(last)
        self.module.set_is_last_backward(last)
        return dict(self.module.train_step(data, optim_wrapper))


def average(model: Any, place: str) -> nn.Module:
    """Wrap a model for ``ddp``.

    Args:
        model: A :class:`~tinymim.engine.model.Trainable`, on its device.
        place: "cpu" or "cuda".
    """
    learned = {id(tensor) for tensor in (*model.learned.parameters(), *model.learned.buffers())}
    named = [*model.named_parameters(), *model.named_buffers()]
    others = [name for name, tensor in named if id(tensor) not in learned]
    MMDistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    mib = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**20
    return MMDistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if place == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=min(max(mib / BUCKETS, 1), 25),
    )


def shard(model: Any, batch: dict[str, Tensor], place: str) -> nn.Module:
    """Shard what a model learns over all processes, in place, for ``fsdp``; before its optimizer is made.

    Args:
        model: A :class:`~tinymim.engine.model.Trainable`, on its device.
        batch: A small batch: blocks that a pass calls get a group of their own, so that their communication overlaps
            with the computation of others; the rest is one group.
        place: "cpu" or "cuda".
    """
    from torch.distributed.fsdp import fully_shard

    kept = copy.deepcopy(model.encoder).cpu()
    blocks = called_blocks(model.learned, lambda: model.train()(**batch))
    send(model.learned)
    average = getattr(model, "ema", None)  # of the weights: it is sharded like them
    if average is not None:
        mesh = dist.init_device_mesh(place, (dist.get_world_size(),))
        pairs = zip(model.network.parameters(), average.module.parameters(), strict=True)
        still = {own for learned, own in pairs if not learned.requires_grad}
        fully_shard(average.module, mesh=mesh, reshard_after_forward=False, ignored_params=still)
    shard_parts(model, blocks, place)
    return ShardedModel(model, kept)


def send(learned: nn.Module) -> None:
    """Give all processes the weights and buffers of the first one."""
    for tensor in learned.state_dict().values():
        dist.broadcast(tensor, 0)


def shard_parts(model: nn.Module, blocks: Iterable[nn.Module], place: str) -> None:
    """Shard the weights that need gradients, in place.

    Args:
        model: The model, on its device, equal on all processes.
        blocks: Parts that get a group of their own.
        place: "cpu" or "cuda".
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(place, (dist.get_world_size(),))
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for each in (*blocks, model):
        fully_shard(each, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    for part in _parts(model):  # all is gathered already; by default it also fetches what passes of an evaluation ran
        part.set_modules_to_backward_prefetch([part])


def _parts(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards, each with a group of its own."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def called_blocks(learned: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """The items of module lists that learn and that a training pass runs as a whole.

    Args:
        learned: Where they are looked for; buffers of its batch normalisation stay as they are.
        run: The pass.
    """
    lists = [module for module in learned.modules() if isinstance(module, nn.ModuleList)]
    called: dict[nn.Module, None] = {}
    handles = [
        item.register_forward_pre_hook(lambda module, _: called.setdefault(module))
        for each in lists
        for item in each
        if any(p.requires_grad for p in item.parameters())
    ]
    buffers = [(buffer, buffer.clone()) for buffer in learned.buffers()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        run()
        for buffer, before in buffers:  # of batch norm
            buffer.copy_(before)
    for handle in handles:
        handle.remove()
    inner = {child for each in called for child in each.modules() if child is not each}
    return [each for each in called if each not in inner]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block the weights of a sharded model are whole on every process; all processes must enter it.

    Passes without gradients then need no communication: one process may run more of them than another.
    """
    parts = _parts(model)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def whole(value: Any) -> Any:
    """State dicts with whole tensors in place of sharded ones; all processes must call it."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def whole_encoder(model: Any) -> nn.Module:
    """The network that is kept, with whole weights; all processes must call it."""
    if not isinstance(model, ShardedModel):
        return getattr(model, "module", model).encoder  # type: ignore[no-any-return]
    (kept,) = model.kept
    kept.load_state_dict(whole(model.module.encoder.state_dict()))
    return kept  # type: ignore[no-any-return]


def shard_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with whole tensors, as this optimizer needs it: sharded like its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: shard_like(v, parameters[i]) for k, v in each.items()} for i, each in state["state"].items()}
    return {**state, "state": moments}


def shard_like(value: Any, own: Any) -> Any:
    """A whole tensor, sharded as another one of its shape is; anything else as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor) or not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


class Vote:
    """Whether any process wants to stop: all must do so after the same step.

    It goes over the processor's network (gloo), also beside nccl: no wait for the GPU, and a process that has ended is
    noticed at once.
    """

    def __init__(self) -> None:
        self.alone = not dist.is_initialized()
        self.group: Any = None if self.alone or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def any(self, mine: bool) -> bool:
        """Whether one of the votes is yes."""
        if self.alone:
            return mine
        votes = torch.tensor(int(mine))
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        return bool(votes)


@contextmanager
def together() -> Iterator[None]:
    """Turn what the network says when another process has ended into one line.

    Raises:
        TinyMIMError: it has.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not LOST.search(str(error)):
            raise
        raise LostProcess(
            f"process {dist.get_rank()} stops: another process of this job has ended",
            "its message is above, or in the log of its machine",
            "correct that, then run the command again with --resume",
        ) from None


class LostProcess(TinyMIMError):
    """Another process of the job has ended."""

    exit_code = 1
