"""The keys of every detector: ViTDet's Mask R-CNN (arXiv 2203.16527) as MAE-Lite trains ViT-T on COCO (640 pixels).

A detector adds its own keys, with published values: ``keys`` in ``tinymim/det/method.py``.
"""

custom_imports = dict(imports=["tinymim.det.method"])
method = "mask_rcnn"
student = "tinymim_vit_tiny"  # the model; with --student FILE, the file's shape overrides it
student_args: dict = {}  # keywords of tinymim.models.ViT
drop_path = 0.0
img_size = 640  # longer side, pixels
batch_size = 64  # global
epochs = 100
warmup_epochs = 0  # see warmup_steps
base_lr = 4e-4  # at batch 256: 1e-4 at 64; lr = base_lr * batch / 256
betas = (0.9, 0.999)
weight_decay = 0.05  # not on 1-D parameters, tokens, positions
precision = "auto"  # of backbone and pyramid: auto | fp32 | bf16; auto: bf16 if the processor supports it
grad_checkpointing = False  # recompute blocks in the backward pass: far less memory, a third more work
micro_batch = None  # photos per forward pass; None: chosen by memory; "auto": timed as well
compile = "off"
strategy = None  # of several processes: ddp
save_every = None  # steps; None: one epoch
val_every = None
seed = 0
workers = None  # data-loading processes; None: chosen by the machine
