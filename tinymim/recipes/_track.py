"""The keys of every tracker, with OSTrack-256's published values (arXiv 2203.11991; MAE-Lite trains the same).

A tracker adds its own keys, also with published values: ``keys`` in ``tinymim/track/method.py``.
"""

custom_imports = dict(imports=["tinymim.track.method"])
method = "track"
student = "tinymim_vit_tiny"  # the model; with --student FILE, the file's shape overrides it
student_args: dict = {}  # keywords of tinymim.models.ViT
drop_path = 0.1  # linear from 0 to this
img_size = 256  # side of the search crop, pixels
batch_size = 128  # global
epochs = 300  # of `samples` pairs
warmup_epochs = 0
base_lr = (
    8e-4  # of the head at batch 256: 4e-4 at 128; lr = base_lr * batch / 256; the backbone's: backbone_lr times it
)
betas = (0.9, 0.999)
weight_decay = 1e-4  # not on 1-D parameters, tokens, positions
precision = "auto"  # auto | fp32 | bf16 | fp16; auto: bf16 if the processor supports it
grad_checkpointing = False  # recompute blocks in the backward pass: far less memory, a third more work
micro_batch = None  # images per forward pass; None: chosen by memory; "auto": timed as well
compile = "off"  # the blocks of a tracker are run in part
strategy = None  # of several processes: ddp
save_every = None  # steps; None: one epoch
val_every = None  # steps; None: one epoch
seed = 0
workers = None  # data-loading processes; None: chosen by the machine
