"""Every key a fine-tuning recipe may have, with the published values for ViT-B (TinyMIM's README and code)."""

method = "finetune"
student = "tinymim_vit_base"  # model where no file says it; its own name beside --student FILE
student_args: dict = {}  # keywords of tinymim.models.ViT
num_heads = None  # heads a block; None: the file's, else the model's
drop_path = 0.2  # linear from 0 to this
img_size = 224  # pixels
batch_size = 1024  # global
epochs = 100
warmup_epochs = 5
base_lr = 5e-4  # at batch 256; lr = base_lr * batch / 256
min_lr = 1e-6
betas = (0.9, 0.999)
weight_decay = 0.05  # not on 1-D parameters, tokens, positions
layer_decay = 0.65  # rate of a layer over that of the next one
crop_scale = (0.08, 1.0)  # area share of the random crop
aa = "rand-m9-mstd0.5-inc1"  # timm's word for RandAugment; None: none
color_jitter = None  # timm: only without aa
reprob = 0.25  # random erasing with random pixels
mixup = 0.8
cutmix = 1.0
mixup_prob = 1.0
switch_prob = 0.5  # of cutmix in place of mixup
smoothing = 0.1
ema = None  # decay of a running average of the weights, e.g. 0.9999 (timm: at most 1 - n^(-2/3) after n steps)
teacher = None  # timm/NAME with a classifier, or a classifier.pth: DeiT's distillation
teacher_weights = None  # file for a timm teacher
distillation = "hard"  # hard | soft
alpha = 0.5  # weight of the teacher
tau = 1.0  # temperature of soft distillation
precision = "auto"  # auto | fp32 | bf16 | fp16; auto: bf16 where the processor has it
grad_checkpointing = False
micro_batch = None  # images a forward pass; None: by memory
save_every = None  # steps; None: an epoch
val_every = None  # steps; None: an epoch
seed = 0
workers = 2
