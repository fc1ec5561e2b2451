# The published schedule. rate(i) = 1e-4 * layer scale * (1 - i / 160000), times
# 1 - (1 - i / 1500) * (1 - 1e-6) in the first 1500 steps. MMEngine reaches a schedule's end value one step before
# `end`, hence 1501 and 160001.
_base_ = ["runtime.py"]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="TinyMIMLayerDecayOptimizerConstructor",
    # published_quirks=True also restores the published habits of decaying pos_embed, cls_token and bias tables
    paramwise_cfg=dict(layer_decay=0.80, published_quirks=False),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160001),
]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
