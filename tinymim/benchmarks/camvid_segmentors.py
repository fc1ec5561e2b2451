"""The rows of the CamVid comparison (docs/compare_camvid.md); how they were chosen stands there.

Students are files that ``--students`` names. Rows of ImageNet knowledge: everything that starts from a student or from
the teacher (DINOv2 was trained on 142 M photos; the distilled students saw its outputs); all others start from scratch.
AdamW has a layer decay of 0.8 for what is pre-trained (but for MAE, see there), 1.0 for what is not; the alternatives
keep their own optimizers.

    python tools/compare_segmentors.py --rows camvid_segmentors --size 0 0 --crop 240 320 --steps 400 --batch-size 8
        --amp --seeds 0 1 2 --students relation=FILE mae=FILE relation_4=FILE feature_4=FILE class_token_4=FILE
        first=FILE teacher=FILE

The recipe's students (``relation``, ``mae``) had 16 passes over the photos, those of methods beside each other
(``*_4``) 4 passes; ``first`` is the untuned student that lay in ``../shared/teachers``, 16 passes.
"""

OURS = "linear_tinymim_t_camvid"
RATE = {
    "optim_wrapper.optimizer.lr": 2e-3
}  # one student: 41.0 at 5e-4, 43.4 at 1e-3, 43.9 at 2e-3; another 50.1, 52.5 at the last two
SCRATCH = {"optim_wrapper.optimizer.lr": 1e-3, "optim_wrapper.paramwise_cfg.layer_decay": 1.0}
TEACHER = "linear_dinov2_s_camvid"
FROZEN = {  # a linear head alone wants a far higher rate: 34.7 at 2e-3, 46.3 at 1e-2, 49.1 at 5e-2, 50.7 at 1.5e-1
    "optim_wrapper.optimizer.lr": 1.5e-1,
    "model.backbone.frozen": True,
}

rows = {
    # the teacher as a segmentor: what there is to be had
    "dinov2_s": dict(config=TEACHER, student="teacher", options={"optim_wrapper.optimizer.lr": 2e-4}),
    "dinov2_s_frozen": dict(config=TEACHER, student="teacher", options=FROZEN),
    # ViT-T with a linear head
    "vit_t_relation": dict(config=OURS, student="relation", options=RATE),
    "vit_t_mae": dict(config=OURS, student="mae", options=SCRATCH),  # 21.4 with RATE, 22.7 with SCRATCH
    "vit_t_first": dict(config=OURS, student="first", options=RATE),
    "vit_t_relation_4": dict(config=OURS, student="relation_4", options=RATE),
    "vit_t_feature_4": dict(config=OURS, student="feature_4", options=RATE),
    "vit_t_class_token_4": dict(config=OURS, student="class_token_4", options=RATE),
    "vit_t_scratch": dict(config=OURS, options=SCRATCH),
    # a trained segmentor as a teacher
    "vit_t_relation_taught": dict(config=OURS, student="relation", options=RATE, teacher_segmentor="dinov2_s"),
    "vit_t_relation_pseudo": dict(config=OURS, student="relation", options=RATE, pseudo="dinov2_s"),
    # alternatives, from scratch; rates searched with one seed: SegFormer 28.7 at 5e-4, 32.1 at 1e-3, 29.6 at 2e-3;
    # PIDNet 19.7 at twice its rate; EfficientViT 34.2 at its own
    "segformer_b0": dict(config="segformer_b0_camvid", options={"optim_wrapper.optimizer.lr": 1e-3}),
    "pidnet_s": dict(config="pidnet_s_camvid", options={"optim_wrapper.optimizer.lr": 2e-2}),
    "deeplabv3plus_r18": dict(config="deeplabv3plus_r18_camvid"),
    "efficientvit_b1": dict(config="efficientvit_b1_camvid"),
}
