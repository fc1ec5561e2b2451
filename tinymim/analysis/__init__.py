"""What was learned: similarity of blocks, attention maps, health metrics, probes of frozen features."""

from tinymim.lazy import lazy

_PLACES = {
    "analyse": "comparison",
    "attention_stats": "attention_maps",
    "cka": "similarity",
    "effective_rank": "similarity",
}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
