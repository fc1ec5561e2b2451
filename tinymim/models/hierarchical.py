"""timm's hierarchical models as backbones: Hiera, TinyViT (arXiv 2207.10666) and Swin, by timm's names.

Four levels at strides 4, 8, 16 and 32, for images of any height and width: ``hiera.py``, ``swin.py``, ``tinyvit.py``.
Tensors keep timm's names; there is no classifier, and no norm after the last stage: ``classifier.py`` adds them.

Legend: B = batch, D = width, H, W = a grid's rows and columns.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.hiera import Hiera
from timm.models.swin_transformer import SwinTransformer
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import hiera, swin, tinyvit
from tinymim.models.backbone import Shell, Stage, from_config, pick_taps, register_backbone
from tinymim.models.draws import draw_by_rows

State = dict[str, Tensor]
HEADS = ("head.", "norm.", "encoder_norm.", "norm_head.")  # of a classifier, or of pre-training
COUNTER = "num_batches_tracked"  # of batch norm; nothing reads it


class Family(NamedTuple):
    """How the models of one of timm's classes are run.

    Attributes:
        prefix: Start of timm's names.
        mark: Pattern of a tensor's name that only such models have, under timm's names or the authors'.
        kind: timm's class.
        blocks: Model -> number of blocks of each stage.
        run: (model, images padded to ``multiple``, number of stages) -> maps (B, D, H, W) of the stages.
        prepare: Changes a new model in place.
        parts_after: (model, stage) -> modules that no map up to this stage depends on.
        adapt: (model, a file's tensors, the config that it stores) -> tensors resized to the model, names of these.
        multiple: Images are padded to a multiple of so many pixels.
        norm_eps: Epsilon of a classifier's norm.
        norm_first: Whether a classifier's norm comes before the mean over the map.
        may_differ: Arguments that a file and a model need not agree on.
        sized: Whether timm's class accepts ``img_size``.
        arguments: Further keywords of timm's class.
    """

    prefix: str
    mark: str
    kind: type[nn.Module]
    blocks: Callable[[Any], Sequence[int]]
    run: Callable[[Any, Tensor, int], list[Tensor]]
    prepare: Callable[[Any], object]
    parts_after: Callable[[Any, int], Sequence[nn.Module]]
    adapt: Callable[[Any, State, dict[str, Any]], tuple[State, list[str]]]
    multiple: int
    norm_eps: float
    norm_first: bool = False
    may_differ: tuple[str, ...] = ()
    sized: bool = True
    arguments: Mapping[str, Any] = {}


def _without_norm(model: Any) -> None:
    model.norm = nn.Identity()  # none of the levels uses it


def _adapt_hiera(model: Any, state: State, config: dict[str, Any]) -> tuple[State, list[str]]:
    return hiera.adapt(model, state, config.get("img_size"))


def _adapt_swin(model: Any, state: State, config: dict[str, Any]) -> tuple[State, list[str]]:
    with torch.device("meta"):
        file: Any = from_config(config) if "img_size" in config else None
    return swin.adapt(model, state, file and [tuple(block.window_size) for block in swin.blocks_of(file)])


FAMILIES = (
    Family(
        "hiera_",
        r"^pos_embed_win$|^blocks\.\d+\.proj\.",
        Hiera,
        hiera.stage_lengths,
        hiera.run_hiera,
        hiera.prepare,
        lambda model, stage: model.blocks[model.stage_ends[stage] + 1 :],
        _adapt_hiera,
        multiple=32,
        norm_eps=1e-6,
    ),
    Family(
        "tiny_vit_",
        r"^(stages|layers)\.\d+\.blocks\.\d+\.local_conv\.",
        TinyVit,
        lambda model: model.depths,
        tinyvit.run_tinyvit,
        tinyvit.forget_biases,
        lambda model, stage: model.stages[stage + 1 :],
        lambda model, state, config: tinyvit.adapt(model, state),
        multiple=1,
        norm_eps=1e-5,
        may_differ=("name", "window_sizes"),  # shapes tell the rest, and tables are resized
        sized=False,
    ),
    Family(
        "swin_",
        r"^layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$",
        SwinTransformer,
        lambda model: [len(stage.blocks) for stage in model.layers],
        swin.run_swin,
        _without_norm,
        lambda model, stage: model.layers[stage + 1 :],
        _adapt_swin,
        multiple=4,
        norm_eps=1e-5,
        norm_first=True,
        arguments={"strict_img_size": False},
    ),
)


def _family(name: str) -> Any:
    """The entry of :data:`FAMILIES` of a timm name."""
    return next(family for family in FAMILIES if name.startswith(family.prefix))


@register_backbone(*timm.list_models([f"{family.prefix}*" for family in FAMILIES]))
class Hierarchical(Shell):
    """A model of :data:`FAMILIES` as a :class:`~tinymim.models.backbone.Backbone`; ``inner`` is timm's own.

    Args:
        name: timm's name, e.g. ``hiera_tiny_224``.
        img_size: Height and width (pixels) at which positions are stored (Hiera), and the default size of exports.
        drop_path_rate: Largest stochastic-depth rate of a linear ramp.
        options: Keywords of timm's class, e.g. ``embed_dims``.

    Raises:
        ConfigError: arguments that timm rejects.
    """

    def __init__(
        self, name: str, *, img_size: int | Sequence[int] = 224, drop_path_rate: float = 0.0, **options: Any
    ) -> None:
        size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        family = _family(name)
        whole = tuple(-(-side // family.multiple) * family.multiple for side in size)
        extra = {**family.arguments, **({"img_size": whole} if family.sized else {})}
        try:
            model: Any = timm.create_model(
                name, num_classes=0, drop_path_rate=float(drop_path_rate), **extra, **options
            )
        except (TypeError, AssertionError, IndexError, ValueError) as error:
            raise ConfigError(
                f"cannot build {name}",
                f"timm rejects its arguments: {error}",
                f"see help({family.kind.__module__}.{family.kind.__name__}) for the keywords",
            ) from None
        model.head = nn.Identity()  # also removes Hiera's norm, which none of the levels uses
        family.prepare(model)
        draw_by_rows(model)
        super().__init__(model)
        self.family = family
        self.config = {"name": name, "img_size": size} | options
        self.must_match = tuple(key for key in ("name", *options) if key not in family.may_differ)
        self.norm_eps, self.norm_first = family.norm_eps, family.norm_first
        self.img_size, self.num_prefix_tokens = size, 0
        counts = list(family.blocks(model))
        self.depth = sum(counts)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        self.stage_info = tuple(
            Stage(int(info["num_chs"]), int(info["reduction"]), range(start, start + count), range(i, i + 1))
            for i, (info, start, count) in enumerate(zip(model.feature_info, starts, counts, strict=True))
        )
        self.patch_size = self.stage_info[0].stride

    @staticmethod
    def more_arguments(name: str) -> Any:
        """timm's class of a model: it takes ``options``."""
        return _family(name).kind

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of chosen stages, with timm's meaning.

        Args:
            images: (B, 3, H, W), normalised.
            indices: Stages from 0 (negative from the end); an int n takes the last n; None takes all.
            norm: Must be False: the stages have no norm of their own.
            stop_early: Do not run stages after the last tap.
            output_fmt: "NCHW" -> (B, D, ceil(H/stride), ceil(W/stride)).
            intermediates_only: Return the list only, not (last map, list).

        Raises:
            ConfigError: no such stage, ``norm``, or another format.
        """
        if norm or output_fmt != "NCHW":
            raise ConfigError(
                f"norm={norm}, output_fmt={output_fmt!r}",
                "the stages of a hierarchical model return maps and have no norm",
                "use norm=False and output_fmt='NCHW'",
            )
        wanted = pick_taps(self, indices)
        count = max(wanted) + 1 if stop_early and intermediates_only else len(self.stage_info)
        height, width = images.shape[-2:]
        unit = self.family.multiple
        if unit > 1:
            below, right = (height + unit - 1) // unit * unit - height, (width + unit - 1) // unit * unit - width
            if not (isinstance(below, int) and isinstance(right, int) and below == right == 0):  # symbolic in exports
                images = F.pad(images, (0, right, 0, below))
        maps = self.family.run(self.inner, images, count)
        if unit > 1:  # cut the padding off again
            maps = [
                x[..., : (height + s.stride - 1) // s.stride, : (width + s.stride - 1) // s.stride]
                for x, s in zip(maps, self.stage_info, strict=False)
            ]
        chosen = [maps[i] for i in sorted(wanted)]
        return chosen if intermediates_only else (maps[-1], chosen)

    def forward_map(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the last stage's map (B, D, ceil(H/32), ceil(W/32))."""
        return self.forward_intermediates(images, indices=1, intermediates_only=True)[0]

    def forward(self, images: Tensor) -> Tensor:
        """Same as :meth:`forward_map`."""
        return self.forward_map(images)

    def parts_after(self, index: int, tap: str = "output") -> list[Any]:
        """Blocks after stage ``index`` (from 0)."""
        return list(self.family.parts_after(self.inner, index))

    def adapt_state(self, state: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
        """A file's tensors resized to this model, and the names of those that were resized.

        Args:
            state: Tensors under timm's names; a classifier's are dropped.
            config: The model config that the file stores; empty for foreign files.

        Raises:
            CheckpointError: positions on a grid that is neither stored nor square.
        """
        state = {key: value for key, value in state.items() if not key.startswith(HEADS)}
        return self.family.adapt(self.inner, state, config)


def name_of(state: State) -> str | None:
    """timm's name of the model of :data:`FAMILIES` with exactly these tensors, under timm's names or the authors'.

    Args:
        state: An encoder's tensors; a classifier's do not count.
    """
    family = next((each for each in FAMILIES if any(re.search(each.mark, key) for key in state)), None)
    state = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    for name in timm.list_models(f"{family.prefix}*") if family else ():
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = Hierarchical(name, img_size=native_size(name))
        own = {key: value.shape for key, value in model.state_dict().items() if not key.endswith(COUNTER)}
        try:
            its, resized = model.adapt_state(state, {})
        except CheckpointError:
            continue
        if not resized and {key: value.shape for key, value in its.items()} == own:
            return name
    return None


def native_size(name: str) -> int:
    """Side (pixels) of the photos that timm's weights of this name were trained on."""
    cfg = timm.get_pretrained_cfg(name)
    return int(cfg.input_size[-1]) if cfg is not None else 224
