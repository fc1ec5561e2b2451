"""Runtimes: one file each, registered by :func:`register_runtime`. Add one by importing a file of your own.

``--runtime``, ``--provider``, ``--precision`` of ``tinymim bench``, ``eval`` and ``predict``, ``tinymim-export
--runtimes``, ``tinymim doctor`` and the reports read the registry.
"""

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
