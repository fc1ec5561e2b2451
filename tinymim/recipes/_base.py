"""The keys of every run on photos without labels, with the published values (README and code of TinyMIM).

The method adds its own keys: ``keys`` of its class in ``tinymim/distill``; ``--print-config`` shows all of them.
"""

method = "tinymim"  # a name of tinymim.distill.METHODS
student = "tinymim_vit_base"
student_args: dict = {}  # keywords of tinymim.models.ViT
drop_path = 0.1  # constant, in every block before the last
img_size = 224  # pixels
crop_scale = (0.2, 1.0)  # share of the photo's area in the random crop
color_jitter = 0.4  # on the student's copy
batch_size = 4096  # global
epochs = 300
warmup_epochs = 15
base_lr = 1.5e-4  # at batch 256; lr = base_lr * batch / 256
min_lr = 0.0
betas = (0.9, 0.95)
weight_decay = 0.05  # not on 1-D parameters
precision = "auto"  # auto | fp32 | bf16 | fp16; auto: bf16 if the processor supports it
grad_checkpointing = False  # recompute blocks in the backward pass: far less memory, a third more work
micro_batch = None  # images per forward pass; None: chosen by memory; "auto": timed as well
compile = "auto"  # auto | on | off: torch.compile of the student's blocks; auto: on a GPU, if a pass is faster
strategy = None  # of several processes: ddp, also if None, | fsdp: weights and moments sharded
save_every = None  # steps; None: one epoch
val_every = None  # steps; None: one epoch
watch_every = None  # steps between health metrics and probes; None: one epoch; 0: never
probe_photos = (
    500  # most photos of --probe-data for training, and as many for validation (ViT-T, two cores: 20 ms each)
)
tensorboard = False  # also write metrics.jsonl as OUT/tensorboard
seed = 0
decode = "crop"  # a JPEG at the 1/2, 1/4 or 1/8 that leaves a crop img_size pixels; "whole": as before 0.12
workers = None  # data-loading processes; None: chosen by the machine
