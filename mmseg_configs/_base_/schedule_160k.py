# The published schedule, and what every run needs. rate(i) = 1e-4 * layer scale * (1 - i / 160000), times
# 1 - (1 - i / 1500) * (1 - 1e-6) in the first 1500 steps. MMEngine reaches a schedule's end value one step before
# `end`, hence 1501 and 160001.
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
train_cfg = dict(type="ResumableTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=None,  # RunFolderHook writes metrics.jsonl and the progress line
    checkpoint=dict(type="RunFolderHook", interval=16000, keep=2, log_interval=10),
)
custom_imports = dict(imports=["tinymim.seg"], allow_failed_imports=False)
default_scope = "mmseg"
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
randomness = dict(seed=0)
log_level = "ERROR"  # RunFolderHook prints what matters; "INFO" brings MMEngine's log back
load_from = None
resume = False
