"""Golden numbers that ``tinymim doctor`` reproduces: a sample of the project's references, small enough to ship.

Computed once with the published implementations (TinyMIM at d084705) on tiny models, float32, CPU, evaluation mode.
Weights are not stored: :func:`tensor` draws each from its name. Inputs: ``numpy.random.RandomState(input_seed)``.
"""

import zlib
from typing import Any

import numpy as np

ONES = ("norm1.weight", "norm2.weight", "norm.weight", "gamma_1", "gamma_2")

GOLDEN: dict[str, Any] = {
    "relations": {
        "teacher": {"embed_dim": 32, "depth": 6, "num_heads": 4, "img_size": 64, "patch_size": 16},
        "student": {"embed_dim": 24, "depth": 12, "num_heads": 2, "img_size": 64, "patch_size": 16},
        "target_block": 4,
        "input_seed": 0,
        "losses": {"qk": 0.3920215666294098, "vv": 0.5435376167297363},
        "gradient_norms": {
            "cls_token": 0.040830738842487335,
            "patch_embed.proj.weight": 0.2706272304058075,
            "blocks.0.norm1.weight": 0.007133179809898138,
            "blocks.5.attn.qkv.weight": 0.028777681291103363,
            "blocks.8.mlp.fc1.weight": 0.052703388035297394,
            "blocks.11.attn.qkv.weight": 0.3535304069519043,
        },
    },
    "seg_backbone_base": {
        "config": {
            "img_size": 128,
            "patch_size": 16,
            "embed_dim": 24,
            "depth": 12,
            "num_heads": 2,
            "init_values": 1.0,
            "out_indices": [3, 5, 7, 11],
            "rel_pos_bias": True,
        },
        "input_seed": 3,
        "levels": [
            {
                "shape": [1, 24, 32, 32],
                "largest": 1.426131,
                "norm": 39.26919,
                "at": [0, 4915, 9830, 14745, 19660, 24575],
                "values": [0.06702321, -0.030967629, -0.40100822, 0.29087105, -0.13111049, 0.010359511],
            },
            {
                "shape": [1, 24, 16, 16],
                "largest": 14.199366,
                "norm": 263.50985,
                "at": [0, 1228, 2457, 3685, 4914, 6143],
                "values": [0.1276855, -2.7829852, -5.7467771, 0.77152622, 0.14764607, -0.15622804],
            },
            {
                "shape": [1, 24, 8, 8],
                "largest": 16.380369,
                "norm": 186.85827,
                "at": [0, 307, 614, 921, 1228, 1535],
                "values": [-2.7929006, -3.5535576, 0.16336724, 4.3627415, -2.222496, 4.2444606],
            },
            {
                "shape": [1, 24, 4, 4],
                "largest": 16.708584,
                "norm": 107.70704,
                "at": [0, 76, 153, 229, 306, 383],
                "values": [6.2375565, 6.2334566, 4.3332338, 6.26298, 0.26718313, 4.8532696],
            },
        ],
    },
    "seg_backbone_star_t": {
        "config": {
            "img_size": 64,
            "patch_size": 16,
            "embed_dim": 192,
            "depth": 12,
            "num_heads": 12,
            "init_values": 1.0,
            "out_indices": [3, 5, 7, 11],
            "rel_pos_bias": True,
            "dist_token": True,
            "last_dim": 1280,
            "pyramid_dim": 768,
        },
        "input_seed": 4,
        "levels": [
            {
                "shape": [1, 768, 16, 16],
                "largest": 47.116611,
                "norm": 4332.98407,
                "at": [0, 39321, 78642, 117964, 157285, 196607],
                "values": [-8.0139332, 1.6602721, -2.8574049, -20.460447, 3.674628, -3.4208343],
            },
            {
                "shape": [1, 768, 8, 8],
                "largest": 168.331848,
                "norm": 8508.0839,
                "at": [0, 9830, 19660, 29490, 39320, 49151],
                "values": [-11.665731, 62.80772, -54.802448, -41.508526, 18.147755, 9.4518538],
            },
            {
                "shape": [1, 768, 4, 4],
                "largest": 179.875793,
                "norm": 4954.72969,
                "at": [0, 2457, 4914, 7372, 9829, 12287],
                "values": [-6.6241059, -66.203224, -25.944002, 11.016931, 27.386616, -42.49305],
            },
            {
                "shape": [1, 768, 2, 2],
                "largest": 12.646739,
                "norm": 179.92245,
                "at": [0, 614, 1228, 1842, 2456, 3071],
                "values": [-0.95270282, 2.553303, -5.4213853, 0.15071057, -0.029538648, 5.6261678],
            },
        ],
    },
}


def tensor(name: str, shape: tuple[int, ...], scale: float = 0.15) -> np.ndarray:
    """The float32 array of a parameter: the same name and shape always give the same values."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * scale
    if name.endswith("running_var"):
        draw = 1 + np.abs(draw)
    elif name.endswith(ONES):
        draw = 1 + draw
    return draw.astype("float32")
