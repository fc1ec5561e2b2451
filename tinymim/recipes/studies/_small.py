"""The ablations in minutes per cell: 96-pixel photos, a student 128 wide, 8 deep, its teacher an MAE 256 wide, 10 deep.

The teacher is pre-trained on the same photos, once for all studies (its seed is fixed). Its block 8 of 10 is read, the
nearest to 18 of 24. Values that a cell keeps are written out, so that the default cell of several tables is one run.
"""

TEACHER_EPOCHS, MAE_EPOCHS, DISTILL_EPOCHS, FINETUNE_EPOCHS = 30, 5, 2, 3
TEACHER_LR, MAE_LR, DISTILL_LR, FINETUNE_LR = 1e-3, 1e-3, 1e-3, 1e-3
BATCH, WORKERS = 64, 1
SPEED = dict(precision="fp32", val_every=100_000)  # scored at the end only
TEACHER = dict(embed_dim=256, depth=10, num_heads=8)
STUDENT = dict(embed_dim=128, depth=8, num_heads=4)

PHOTOS = dict(data="{photos}", img_size=96, batch_size=BATCH, workers=WORKERS)
PRETRAIN = dict(warmup_epochs=0.5, crop_scale=(0.25, 1.0), decode="whole", watch_every=0, **SPEED)
DECODER = dict(dim=128, depth=2, heads=4)

stages = dict(
    teacher=dict(
        verb="pretrain",
        recipe="mae_tiny",
        epochs=TEACHER_EPOCHS,
        lr=TEACHER_LR,
        seed=0,
        cfg_options=dict(student_args=TEACHER, decoder=DECODER, **PRETRAIN),
        **PHOTOS,
    ),
    mae=dict(
        verb="pretrain",
        recipe="mae_tiny",
        epochs=MAE_EPOCHS,
        lr=MAE_LR,
        seed="{seed}",
        cfg_options=dict(student_args=STUDENT, decoder=DECODER, **PRETRAIN),
        **PHOTOS,
    ),
    distill=dict(
        verb="distill",
        recipe="tinymim_tiny_from_mae_base",
        teacher="{teacher.student}",
        epochs=DISTILL_EPOCHS,
        lr=DISTILL_LR,
        seed="{seed}",
        targets=["qk+vv"],
        cfg_options=dict(
            student_args=STUDENT,
            decoder=DECODER,
            target_block=8,
            softmax=True,
            drop_path=0.1,
            teacher_drop_path=0.0,
            reconstruct=0.0,
            **PRETRAIN,
        ),
        **PHOTOS,
    ),
    finetune=dict(
        verb="finetune",
        recipe="finetune_tiny",
        student="{distill.student}",
        val_data="{val_photos}",
        epochs=FINETUNE_EPOCHS,
        lr=FINETUNE_LR,
        seed="{seed}",
        cfg_options=dict(
            student_args=STUDENT,
            warmup_epochs=0.5,
            layer_decay=0.85,
            crop_scale=(0.25, 1.0),
            decode="whole",
            aa="",  # three epochs: light augmentation
            mixup=0.0,
            smoothing=0.1,
            **SPEED,
        ),
        **PHOTOS,
    ),
)
score = "finetune.top1"
seeds = [0, 1, 2]
