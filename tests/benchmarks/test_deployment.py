"""tools/study_deployment.py: MMSegmentation's own backbone with our weights computes what our model computes."""

import pytest
import torch

from tinymim.benchmarks.deployment_files import stock_segmentor
from tinymim.errors import ConfigError


def segmentor(**backbone):
    """upernet_tinymim_demo with random weights, and its configuration."""
    import tinymim.seg  # noqa: F401  (must come before mmseg)

    from mmengine.registry import init_default_scope  # isort: skip
    from mmseg.registry import MODELS  # isort: skip

    from tinymim.seg.config import find_config, heads, plain_batch_norm

    cfg = find_config("upernet_tinymim_demo")
    plain_batch_norm(cfg)
    for head in heads(cfg):
        head.num_classes = 5
    cfg.model.backbone.update(backbone)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval(), cfg


def test_the_same_weights_give_the_same_scores():
    model, cfg = segmentor()
    stock = stock_segmentor(model, cfg)
    assert type(stock.backbone).__module__.startswith("mmseg.")
    image = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(stock._forward(image), model._forward(image), rtol=1e-3, atol=1e-3)


def test_weights_that_have_no_place_there_are_refused():
    with pytest.raises(ConfigError, match="do not fit MMSegmentation's VisionTransformer"):
        stock_segmentor(*segmentor(init_values=0.1))
