"""Every key a recipe may have, with the published TinyMIM pre-training values (README and code of the paper)."""

method = "tinymim"  # tinymim | mae
student = "tinymim_vit_base"
student_args: dict = {}  # keywords of tinymim.models.ViT
teacher = None  # timm/NAME or a checkpoint file
teacher_weights = None  # file for a timm teacher
teacher_heads = None  # for files that do not store the head count
teachers: list = []  # several at once: dicts of teacher, weight, and of teacher_weights .. align here for its own
chain = ""  # e.g. mae_large:base:small:tiny; hop by hop, every student is the next teacher
hops: list = []  # of a chain: a dict of overrides a student
target_block = None  # teacher block, from 1; None: 18 of 24, else the last
relation_heads = None  # None: the teacher's heads
targets = ["qk+vv"]  # words of tinymim.distill.targets: WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]
softmax = True  # of relations; False: smooth L1 of the scaled scores
class_token = None  # in relations and features; None: where both sides have one
mask = None  # tinymim: who sees only the visible patches: None | "student" | "teacher" | "both"
reconstruct = 0.0  # tinymim, masked student: weight of MAE's loss beside the others
teacher_drop_path = 0.0  # constant, in every block
align = None  # patch sizes that differ: "image" resizes the teacher's photo, "tokens" its tokens
drop_path = 0.1  # constant, in every block before the last
img_size = 224  # pixels
crop_scale = (0.2, 1.0)  # area share of the random crop
color_jitter = 0.4  # on the student's copy
batch_size = 4096  # global
epochs = 300
warmup_epochs = 15
base_lr = 1.5e-4  # at batch 256; lr = base_lr * batch / 256
min_lr = 0.0
betas = (0.9, 0.95)
weight_decay = 0.05  # not on 1-D parameters
mask_ratio = 0.75  # mae, and tinymim with a mask
norm_pix = True  # mae, reconstruct
decoder = dict(dim=512, depth=8, heads=16)  # mae, reconstruct
precision = "auto"  # auto | fp32 | bf16 | fp16; auto: bf16 where the processor has it
grad_checkpointing = False
micro_batch = None  # images a forward pass; None: by memory
save_every = None  # steps; None: an epoch
val_every = None  # steps; None: an epoch
watch_every = None  # steps between looks at health and probes; None: an epoch; 0: never
probe_photos = 500  # of --probe-data, at most, for training and as many for validation (ViT-T, two cores: 20 ms each)
tensorboard = False  # metrics.jsonl also as OUT/tensorboard
seed = 0
workers = 2
