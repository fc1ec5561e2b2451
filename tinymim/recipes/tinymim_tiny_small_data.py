"""ViT-T from DINOv2 ViT-S/14 for a few hundred to 20,000 photos and a CPU: about an hour on a core.

The values are those of single runs on 7,357 photos (Imagenette, an ImageNet sample, CamVid's training photos); the
study ``small_data`` changes them one at a time. Give it general photos and those of your task, labelled or not:

    tinymim distill --recipe tinymim_tiny_small_data --data '{general,mine}' --dry-run
"""

_base_ = "./_base.py"
student = "tinymim_vit_tiny"
teacher = "timm/vit_small_patch14_dinov2"
targets = ["qk+vv"]
target_block = 10  # of 12
align = "image"  # the teacher's patches are 14 pixels: its photo is resized until both grids agree
img_size = 128
crop_scale = (0.25, 1.0)
drop_path = 0.0
batch_size = 32  # after one pass over the photos the loss was 0.60, with 128 it was 0.86
base_lr = 1.2e-2  # 1.5e-3 at batch 32
epochs = 16
warmup_epochs = 0.5
