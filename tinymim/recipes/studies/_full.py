"""The paper's default ablation at full size: ViT-B from MAE ViT-L block 18, 100 epochs of ImageNet-1k at 224 pixels.

Pre-training and fine-tuning are the published ones (README and code of the paper); MAE's row uses its own 1600
epochs. Values that a cell keeps are written out, so that the default cell of several tables is one run.
"""

PHOTOS = dict(data="{photos}", seed="{seed}")

stages = dict(
    mae=dict(verb="pretrain", recipe="mae_base", epochs=1600, **PHOTOS),
    distill=dict(
        verb="distill",
        recipe="tinymim_base_from_mae_large",
        teacher="timm/vit_large_patch16_224.mae",
        epochs=100,
        targets=["qk+vv"],
        cfg_options=dict(target_block=18, softmax=True, drop_path=0.1, teacher_drop_path=0.0, reconstruct=0.0),
        **PHOTOS,
    ),
    finetune=dict(
        verb="finetune",
        recipe="finetune_base",
        student="{distill.student}",
        val_data="{val_photos}",
        epochs=100,
        **PHOTOS,
    ),
)
score = "finetune.top1"
seeds = [0]
