"""The small forms with a real teacher: DINOv2 ViT-S/14 (``--teacher-weights``) instead of an autoencoder made here.

The student and the photos are those of ``_small.py`` (128 wide, 8 blocks, 96 pixels); batch 32 and one pass over the
photos, in bfloat16 where the processor has it. Block 10 of 12 is read (see the study ``small_data``). Every student is
fine-tuned on the classes of the photos and on CamVid.
"""

_base_ = "./_small.py"
TEACHER_OF_ALL = dict(
    teacher="timm/vit_small_patch14_dinov2",
    teacher_weights="{teacher_weights}",
    batch_size=32,
    epochs=1,
    cfg_options=dict(
        target_block=10,
        align="image",
        relation_heads=4,
        warmup_epochs=0.1,
        decode="crop",
        precision="auto",
    ),
)
STEPS = 400  # see the study segmentation_steps_dinov2
SEGMENT = dict(
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
        "optim_wrapper.optimizer.lr": 1e-3,
        "param_scheduler.0.end": STEPS // 20 + 1,
        "param_scheduler.1.end": STEPS + 1,
        "train_cfg.max_iters": STEPS,
        "train_cfg.val_interval": STEPS,
        "default_hooks.checkpoint.interval": STEPS,
        "train_dataloader.num_workers": 1,
        "val_dataloader.num_workers": 1,
    },
)
stages = dict(distill=TEACHER_OF_ALL, segment=SEGMENT)
also = ["segment.mIoU"]
