"""How to distil a ViT-T for a few hundred labelled photos: one choice changed at a time, in minutes per cell.

No table of a paper. Teacher: DINOv2 ViT-S/14 (``--teacher-weights FILE``). ``--data`` names general photos without
labels, ``--seg-data`` labelled ones, whose training photos are distilled from, too. One pass over all photos, then 200
steps of segmentation with a linear head: enough to rank the choices, far from what a student can reach. The recipe
``tinymim_tiny_small_data`` is what came of it.
"""

title = "Distilling for small data: one choice at a time"
STEPS = 200
DISTILL = "distill.cfg_options"

stages = dict(
    distill=dict(
        verb="distill",
        recipe="tinymim_tiny_from_mae_base",
        teacher="timm/vit_small_patch14_dinov2",
        teacher_weights="{teacher_weights}",
        data="{all_photos}",
        targets=["qk+vv"],
        img_size=128,
        batch_size=32,
        epochs=1,
        lr=1e-3,
        seed="{seed}",
        workers=1,
        cfg_options=dict(
            target_block=10,
            align="image",
            drop_path=0.0,
            color_jitter=0.4,
            warmup_epochs=0.1,
            crop_scale=(0.25, 1.0),
            watch_every=0,
            val_every=100_000,
        ),
    ),
    segment=dict(
        verb="segment",
        config="linear_tinymim_t_camvid",
        data_root="{segments}",
        student="{distill.student}",
        amp=True,
        cfg_options={
            "randomness.seed": "{seed}",
            "optim_wrapper.optimizer.lr": 1e-3,
            "param_scheduler.0.end": STEPS // 20 + 1,
            "param_scheduler.1.end": STEPS + 1,
            "train_cfg.max_iters": STEPS,
            "train_cfg.val_interval": STEPS,
            "default_hooks.checkpoint.interval": STEPS,
            "train_dataloader.num_workers": 1,
            "val_dataloader.num_workers": 1,
        },
    ),
)
cells = [
    dict(name="default"),
    dict(name="target block 8", set={f"{DISTILL}.target_block": 8}),
    dict(name="target block 9", set={f"{DISTILL}.target_block": 9}),
    dict(name="target block 11", set={f"{DISTILL}.target_block": 11}),
    dict(name="target block 12", set={f"{DISTILL}.target_block": 12}),
    dict(name="features: output of block 11", set={"distill.targets": ["output@11"]}),
    dict(name="features: q, k, v of block 10", set={"distill.targets": ["qkv"]}),
    dict(name="relations and output of block 11", set={"distill.targets": ["qk+vv", "output@11"]}),
    dict(name="relations of blocks 5 and 10", set={"distill.targets": ["qk+vv@10:12", "qk+vv@5:6"]}),
    dict(  # relations end at the last block's q, k and v: the rest of it is not trained
        name="segmentation on block 11 of the student",
        set={"segment.cfg_options.model.backbone.out_indices": [10]},
    ),
    dict(name="align tokens", set={f"{DISTILL}.align": "tokens"}),
    dict(name="crops from 8 % of the photo", set={f"{DISTILL}.crop_scale": [0.08, 1.0]}),
    dict(name="crops of 224 pixels, a third of the passes", set={"distill.img_size": 224, "distill.epochs": 0.3333}),
    dict(name="general photos only", set={"distill.data": "{photos}", "distill.epochs": 1.0525}),
    dict(name="photos of the domain only", set={"distill.data": "{segment_photos}", "distill.epochs": 20}),
    dict(
        name="photos of the domain only, crops from 5 to 50 %",
        set={"distill.data": "{segment_photos}", "distill.epochs": 20, f"{DISTILL}.crop_scale": [0.05, 0.5]},
    ),
    dict(name="no colour jitter", set={f"{DISTILL}.color_jitter": 0.0}),
    dict(name="drop path 0.1", set={f"{DISTILL}.drop_path": 0.1}),
    dict(name="batch 128", set={"distill.batch_size": 128}),
    dict(name="batch 16", set={"distill.batch_size": 16}),
    dict(name="rate 2e-3", set={"distill.lr": 2e-3}),
    dict(name="rate 5e-4", set={"distill.lr": 5e-4}),
    dict(name="warm-up of half the run", set={f"{DISTILL}.warmup_epochs": 0.5}),
    dict(
        name="6 heads",
        set={f"{DISTILL}.student_args.num_heads": 6, "segment.cfg_options.model.backbone.num_heads": 6},
    ),
    dict(
        name="8 blocks",
        set={
            f"{DISTILL}.student_args.depth": 8,
            "segment.cfg_options.model.backbone.depth": 8,
            "segment.cfg_options.model.backbone.out_indices": [7],
        },
    ),
    dict(name="two passes", set={"distill.epochs": 2}),
    dict(name="four passes", set={"distill.epochs": 4}),
    dict(
        name="scratch",
        set={"segment.student": None, "segment.cfg_options.optim_wrapper.paramwise_cfg.layer_decay": 1.0},
    ),
]
score = "segment.mIoU"
seeds = [0, 1, 2]
