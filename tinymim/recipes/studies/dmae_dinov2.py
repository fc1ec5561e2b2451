"""The questions of MAE-Lite's papers (arXiv 2205.14443, 2404.12210) on real photos, in minutes per cell.

Does masked pre-training help a light ViT where labels are many, and where they are few? Does distilling a teacher's
attention beside it mend what it lacks, and how far are relations without a mask? One student (128 wide, 8 blocks), one
teacher (DINOv2 ViT-S/14, block 10), the same passes over the same photos for all; then fine-tuning on all labels, on
40 photos of each class, and CamVid. "Supervised" starts the last from the weights fine-tuned on all labels.
"""

_base_ = "./_small.py"
title = "MAE, D-MAE, D2-MAE and TinyMIM where labels are many and few (small form, DINOv2 ViT-S/14)"
PASSES, FEW, STEPS = 4, 40, 400
SHAPE = dict(embed_dim=128, depth=8, num_heads=4)
OF_ALL = dict(data="{all_photos}", img_size=128, batch_size=32, epochs=PASSES, lr=1.5e-3, seed="{seed}", workers=1)
SET = dict(
    student_args=SHAPE,
    warmup_epochs=0.5,
    crop_scale=(0.25, 1.0),
    drop_path=0.0,
    watch_every=0,
    val_every=100_000,
)
MASKED = dict(**SET, mask_ratio=0.75, decoder=dict(dim=96, depth=1, heads=3))
TAUGHT = dict(teacher="timm/vit_small_patch14_dinov2", teacher_weights="{teacher_weights}")
TUNE = dict(
    verb="finetune",
    recipe="finetune_mae_lite_tiny",
    student="{distill.student}",
    val_data="{val_photos}",
    data="{photos}",
    img_size=128,
    batch_size=64,
    lr=1e-3,
    seed="{seed}",
    workers=1,
    cfg_options=dict(
        student_args=SHAPE,
        num_heads=4,
        warmup_epochs=0.5,
        crop_scale=(0.25, 1.0),
        aa="",
        smoothing=0.1,
        val_every=100_000,
    ),
)
stages = dict(
    _delete_=True,
    mae=dict(verb="pretrain", recipe="mae_lite_tiny", cfg_options=MASKED, **OF_ALL),
    distill=dict(
        verb="distill",
        recipe="tinymim_tiny_from_mae_base",
        targets=["qk+vv"],
        cfg_options=dict(**SET, target_block=10, relation_heads=4, align="image"),
        **TAUGHT,
        **OF_ALL,
    ),
    finetune=dict(epochs=3, **TUNE),
    few=dict(epochs=30, **{**TUNE, "cfg_options": {**TUNE["cfg_options"], "photos_per_class": FEW}}),
    segment=dict(
        verb="segment",
        config="linear_tinymim_t_camvid",
        data_root="{segments}",
        student="{distill.student}",
        amp=True,
        cfg_options={
            "randomness.seed": "{seed}",
            "model.backbone.embed_dim": 128,
            "model.backbone.depth": 8,
            "model.backbone.num_heads": 4,
            "model.backbone.out_indices": [7],
            "model.decode_head.in_channels": 128,
            "model.decode_head.channels": 128,
            "optim_wrapper.optimizer.lr": 2e-3,
            "train_cfg.max_iters": STEPS,
            "train_cfg.val_interval": STEPS,
            "default_hooks.checkpoint.interval": STEPS,
            "train_dataloader.num_workers": 1,
            "val_dataloader.num_workers": 1,
        },
    ),
)
NONE = {
    "finetune.student": None,
    "finetune.model": "tinymim_vit_tiny",
    "finetune.cfg_options.layer_decay": 1.0,
    "few.student": None,
    "few.model": "tinymim_vit_tiny",
    "few.cfg_options.layer_decay": 1.0,
}
UNTRAINED = {
    "segment.student": None,
    "segment.cfg_options.optim_wrapper.optimizer.lr": 1e-3,
    "segment.cfg_options.optim_wrapper.paramwise_cfg.layer_decay": 1.0,
}
cells = [
    dict(name="scratch", set={**NONE, **UNTRAINED}),
    dict(name="supervised", set={**NONE, "segment.student": "{finetune.classifier}"}),
    dict(name="MAE", set={f"{stage}.student": "{mae.student}" for stage in ("finetune", "few", "segment")}),
    dict(
        name="D-MAE",
        set={
            "distill.recipe": "dmae_tiny_from_mae_base",
            "distill.targets": None,
            "distill.cfg_options": dict(**MASKED, align="image", teacher_blocks=[10]),
        },
    ),
    dict(
        name="D2-MAE",
        set={
            "distill.recipe": "d2mae_tiny_from_mae_base",
            "distill.targets": None,
            "distill.cfg_options": dict(**MASKED, align="image", teacher_blocks=[10]),
        },
    ),
    dict(name="TinyMIM"),
]
score = "segment.mIoU"
also = ["finetune.top1", "few.top1"]
seeds = [0, 1, 2]
