"""Runtimes: one file each, registered by :func:`register_runtime`; a file in this folder is found by itself.

``--runtime``, ``--provider``, ``--precision`` of ``tinymim bench``, ``eval`` and ``predict``, ``tinymim-export
--runtimes``, ``tinymim doctor`` and the reports read the registry.
"""

from tinymim.lazy import import_all
from tinymim_export.runtime.engines.base import (
    RUNTIMES,
    Engine,
    Port,
    compute_types,
    open_engine,
    packages,
    provider_names,
    provider_word,
    random_input,
    register_runtime,
)
from tinymim_export.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tinymim_export.runtime.engines.openvino import OpenVINOEngine
from tinymim_export.runtime.providers import Provider

__all__ = [
    "RUNTIMES",
    "Engine",
    "OnnxRuntimeEngine",
    "OpenVINOEngine",
    "Port",
    "Provider",
    "compute_types",
    "open_engine",
    "packages",
    "provider_names",
    "provider_word",
    "random_input",
    "register_runtime",
]

import_all(__name__)  # those that are not named above, too
