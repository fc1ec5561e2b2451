"""A TinyViT-5M from stored targets, from the same teacher beside it, and from labels alone: accuracy, and seconds.

No table of a paper. The teacher is a classifier of the photos' classes (``--teacher-weights``), the store holds all its
probabilities of every epoch; 112 pixels are whole patches of 14 and of 16. Imagenette has ten classes:

    tinymim finetune --student ../shared/teachers/student_tiny_16_epochs.pth --data IN/train --val-data IN/val \\
        --img-size 112 --epochs 10 --batch-size 32 --out runs/teacher
    tinymim cache --teacher runs/teacher/classifier.pth --data IN/train --img-size 112 --topk 10 --epochs 10 --out STORE
    tinymim study fast_distill --data IN --seg-data CAMVID --teacher-weights runs/teacher/classifier.pth --store STORE

Every cell is fine-tuned on the photos' labels and on CamVid. The seconds of each stage are in the results; for images/s
and memory of a step run both forms with ``--dry-run``. From the store every seed sees the same crops, beside the
teacher its own.
"""

title = "Fast distillation: from a store, beside the teacher, and without"
EPOCHS, FINETUNE_EPOCHS, STEPS = 10, 3, 400
COMMON = dict(data="{photos}", img_size=112, batch_size=32, seed="{seed}", workers=1)
stages = dict(
    distill=dict(
        verb="distill",
        recipe="tinyvit_5m_from_store",
        epochs=EPOCHS,
        lr=1e-3,
        cfg_options=dict(warmup_epochs=0.5, watch_every=0),
        **COMMON,
    ),
    finetune=dict(
        verb="finetune",
        recipe="finetune_tiny",
        model="tiny_vit_5m_224",
        student="{distill.student}",
        val_data="{val_photos}",
        epochs=FINETUNE_EPOCHS,
        lr=5e-4,
        cfg_options=dict(warmup_epochs=0.1, drop_path=0.0, layer_decay=0.8, mixup=0.0, cutmix=0.0, val_every=100_000),
        **COMMON,
    ),
    segment=dict(
        verb="segment",
        config="upernet_tinyvit_5m_light_camvid",
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
    dict(name="from a store", set={"distill.store": "{store}"}),
    dict(name="beside the teacher", set={"distill.teacher": "{teacher_weights}"}),
    dict(
        name="labels only",
        set={
            "finetune.student": None,
            "segment.student": None,
            "segment.cfg_options.optim_wrapper.paramwise_cfg.layer_decay": 1.0,
        },
    ),
]
score = "finetune.top1"
also = ["segment.mIoU"]
seeds = [0, 1, 2]
