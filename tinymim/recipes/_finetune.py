"""The keys of every fine-tuning run, with the published values for ViT-B (TinyMIM's README and code).

Fine-tuning adds its own keys, also with published values: ``keys`` in ``tinymim/engine/classify.py``.
"""

method = "finetune"
student = "tinymim_vit_base"  # the model; with --student FILE, the file's shape overrides it
student_args: dict = {}  # keywords of tinymim.models.ViT
drop_path = 0.2  # linear from 0 to this
img_size = 224  # pixels
batch_size = 1024  # global
epochs = 100
warmup_epochs = 5
base_lr = 5e-4  # at batch 256; lr = base_lr * batch / 256
min_lr = 1e-6
betas = (0.9, 0.999)
weight_decay = 0.05  # not on 1-D parameters, tokens, positions
crop_scale = (0.08, 1.0)  # share of the photo's area in the random crop
color_jitter = None  # timm: only without aa
precision = "auto"  # auto | fp32 | bf16 | fp16; auto: bf16 if the processor supports it
grad_checkpointing = False  # recompute blocks in the backward pass: far less memory, a third more work
micro_batch = None  # images per forward pass; None: chosen by memory; "auto": timed as well
compile = "auto"  # auto | on | off: torch.compile of the student's blocks; auto: on a GPU, if a pass is faster
strategy = None  # of several processes: ddp, also if None, | fsdp: weights and moments sharded
save_every = None  # steps; None: one epoch
val_every = None  # steps; None: one epoch
seed = 0
decode = "crop"  # a JPEG at the 1/2, 1/4 or 1/8 that leaves a crop img_size pixels; "whole": as before 0.12
workers = None  # data-loading processes; None: chosen by the machine
