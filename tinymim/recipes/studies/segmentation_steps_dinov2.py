"""How many steps of segmentation the small forms with a real teacher take (``STEPS`` of ``_dinov2.py``).

One student of ``_dinov2.py``, and the same model from scratch, on CamVid. A training has flattened where twice the
steps bring less than a point of mIoU; the small forms take the first such number, no fewer than the comparison's 400.
"""

_base_ = "./_dinov2.py"
title = "Steps of segmentation (small form, DINOv2 ViT-S/14)"
SET = "segment.cfg_options"
cells = [
    dict(
        name=f"{steps} steps, {start}",
        set={
            f"{SET}.train_cfg.max_iters": steps,
            f"{SET}.train_cfg.val_interval": steps,
            f"{SET}.default_hooks.checkpoint.interval": steps,
            f"{SET}.param_scheduler.0.end": steps // 20 + 1,
            f"{SET}.param_scheduler.1.end": steps + 1,
            **more,
        },
    )
    for start, more in [
        ("distilled", {}),
        ("scratch", {"segment.student": None, f"{SET}.optim_wrapper.paramwise_cfg.layer_decay": 1.0}),
    ]
    for steps in (100, 200, 400, 800, 1600)
]
score = "segment.mIoU"
also = []
seeds = [0]
