"""Table 9: segmentation after each way to pre-train, in minutes per cell: CamVid next to the paper's ADE20K.

The students are those of the small table 8. UperNet 64 wide, 200 steps of 4 crops 240x320, no layer decay.
"""

_base_ = "./_small.py"
title = "Table 9: segmentation (small form)"
paper = dict(table=9, metric="ADE20K mIoU, ViT-B, 300 epochs", note="Relations far ahead; the class token hurts")
STEPS, WIDTH = 200, 128
stages = dict(
    segment=dict(
        verb="segment",
        config="upernet_tinymim_t_light_camvid",
        data_root="{segments}",
        student="{distill.student}",
        cfg_options={
            "randomness.seed": "{seed}",
            "model.backbone.embed_dim": WIDTH,
            "model.backbone.depth": 8,
            "model.backbone.num_heads": 4,
            "model.backbone.out_indices": [1, 3, 5, 7],
            "model.backbone.drop_path_rate": 0.0,
            "model.decode_head.in_channels": [WIDTH] * 4,
            "model.decode_head.channels": 64,
            "model.auxiliary_head.in_channels": WIDTH,
            "model.auxiliary_head.channels": 64,
            "optim_wrapper.paramwise_cfg.layer_decay": 1.0,
            "optim_wrapper.optimizer.lr": 5e-4,
            "param_scheduler.0.end": STEPS // 20 + 1,
            "param_scheduler.1.end": STEPS + 1,
            "train_cfg.max_iters": STEPS,
            "train_cfg.val_interval": STEPS,
            "default_hooks.checkpoint.interval": STEPS,
            "train_dataloader.batch_size": 4,
            "train_dataloader.num_workers": 1,
            "val_dataloader.num_workers": 1,
        },
    )
)
cells = [
    dict(name="scratch", paper=47.2, set={"segment.student": None}),
    dict(name="MAE", paper=48.1, set={"segment.student": "{mae.student}"}),
    dict(name="class token", paper=46.2, set={"distill.targets": ["class_token"]}),
    dict(name="feature", paper=47.7, set={"distill.targets": ["qkv"]}),
    dict(name="relation", paper=52.2),
]
score = "segment.mIoU"
