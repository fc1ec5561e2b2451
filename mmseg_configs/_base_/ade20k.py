# ADE20K (SceneParse150) at 512 pixels. Any folder in its layout works: tinymim segment CONFIG --data-root FOLDER.
data_root = "data/ADEChallengeData2016"
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabel"),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
val_pipeline = [  # labels are read after the resize: scores are computed at the photo's own size
    dict(type="LoadPhoto"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadLabel"),
    dict(type="PackSegInputs"),
]
test_pipeline = [  # photos without labels (mmseg.apis.inference_model)
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="PackSegInputs"),
]
tta_pipeline = [  # six sizes around the single-scale one, each with its mirror image
    dict(type="LoadPhoto"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(1024, 256), keep_ratio=True),
                dict(type="Resize", scale=(1536, 384), keep_ratio=True),
                dict(type="Resize", scale=(2048, 512), keep_ratio=True),
                dict(type="Resize", scale=(2560, 640), keep_ratio=True),
                dict(type="Resize", scale=(3072, 768), keep_ratio=True),
                dict(type="Resize", scale=(3584, 896), keep_ratio=True),
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadLabel")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
# The published batch is 16 = 8 GPUs x 2. batch_size counts per process: on n GPUs add
# --cfg-options train_dataloader.batch_size=M with M = 16 / n.
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="ResumableSampler", shuffle=True),
    dataset=dict(type="TinyMIMSegDataset", data_root=data_root, split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False, round_up=False),
    dataset=dict(type="TinyMIMSegDataset", data_root=data_root, split="val", pipeline=val_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="SegMetric")
test_evaluator = val_evaluator
