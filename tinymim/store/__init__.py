"""Targets of a teacher on disk: written once, read by every student.

``layout`` says what lies where, ``places`` where a store is (a folder, or object storage through fsspec), ``writer``
and ``targets`` write and read it, ``official`` converts TinyViT's published format; none of them imports torch.
``caching`` runs the teacher (``tinymim cache``).
"""

from tinymim.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Array": "layout",
        "TargetStore": "targets",
        "TargetWriter": "writer",
        "cache_targets": "caching",
    },
)
