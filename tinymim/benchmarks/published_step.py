"""TinyMIM's published training step, re-created to be measured beside ours; written from its description alone.

Source: the paper (arXiv 2301.01296), and facts read in its code (github.com/OliverRensu/TinyMIM at d084705) without
copying any of it. Kept as published, each with its cost:

- Attention is explicit: scores, softmax and weighted sum store (B, H, T, T) tensors in every block, of both models.
- A relation is a softmax that is stored, then its logarithm, then KL: teacher and student, Q-K and V-V, each a float32
  (B, M, T, T) tensor of its own, and two products of them (303 MiB each: ViT-B from ViT-L, 128 images of 224 pixels).
- The teacher's weights stay float32 and are cast anew in every product under autocast; on the CPU nothing is cast.
- The loss and its two parts are read on the host in every step, the device is waited for, the norm of all gradients is
  computed and not used.
- Every parameter of the student is in the optimizer, the last block's unused ones too.
- Photos: two pipelines in the CPU's workers, each with its own conversion to float32 and normalisation, colour jitter
  by Pillow; both float32 views are copied to the device. Workers are not persistent.
- The precision is float16 under autocast with a scaled loss on a GPU, float32 on the CPU; AdamW as PyTorch builds it.

As published the teacher stops behind the q, k, v of its target block (18 of ViT-L's 24); ``whole_teacher`` runs its
other blocks too, which is no part of the published step.

Legend: B = batch, T = tokens (class token first), D = width, H = heads, M = relation heads, C = channels per head.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, heads, T, C)."""
    return x_BTD.unflatten(2, (heads, -1)).transpose(1, 2)


def relation(a_BTD: Tensor, b_BTD: Tensor, heads: int) -> Tensor:
    """The stored relation softmax(A B^T / sqrt(C)), (B, M, T, T)."""
    a_BMTC, b_BMTC = split_heads(a_BTD, heads), split_heads(b_BTD, heads)
    return ((a_BMTC @ b_BMTC.transpose(2, 3)) * a_BMTC.shape[-1] ** -0.5).softmax(-1)


class PublishedBlock(nn.Module):
    """A pre-norm block whose attention stores its scores; names of the weights are timm's."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = Mlp(width, 4 * width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, each (B, T, D)."""
        return self.attn["qkv"](self.norm1(x_BTD)).chunk(3, dim=-1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BTD, k_BTD, v_BTD = self.qkv(x_BTD)
        with record_function("attention"):  # for --profile
            attention_BHTT = relation(q_BTD, k_BTD, self.heads)
            mixed_BTD = (attention_BHTT @ split_heads(v_BTD, self.heads)).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.drop_path(self.attn["proj"](mixed_BTD))
        return x_BTD + self.drop_path(self.mlp(self.norm2(x_BTD)))


class PublishedViT(nn.Module):
    """A ViT that gives the two relations of one block; patches of 16 pixels.

    Args:
        img_size: Pixels, a multiple of 16.
        width: D.
        depth: Blocks.
        heads: Heads of every block whose attention is computed.
        relation_heads: Heads of the relations (of the student's last block: the teacher's).
        block: Block, from 1, whose relations are returned; no later one is run.
        drop_path: Constant rate of the blocks before it.
        whole: Run the rest of that block and all later ones, for nothing.
    """

    def __init__(
        self,
        *,
        img_size: int,
        width: int,
        depth: int,
        heads: int,
        relation_heads: int,
        block: int,
        drop_path: float = 0.0,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.relation_heads, self.whole = block, relation_heads, whole
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        positions = torch.randn(1, (img_size // 16) ** 2 + 1, width) * 0.02
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        rates = [drop_path if i + 1 < block else 0.0 for i in range(depth)]
        self.blocks = nn.ModuleList(PublishedBlock(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S), normalised -> the Q-K and V-V relations, (B, M, T, T) each."""
        x_BND = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x_BTD = torch.cat([self.cls_token.expand(len(images), -1, -1), x_BND], dim=1) + self.pos_embed
        for block in self.blocks[: self.block - 1]:
            x_BTD = block(x_BTD)
        last: Any = self.blocks[self.block - 1]
        q_BTD, k_BTD, v_BTD = last.qkv(x_BTD)
        if self.whole:
            for block in self.blocks[self.block - 1 :]:
                x_BTD = block(x_BTD)
        with record_function("loss"):
            return relation(q_BTD, k_BTD, self.relation_heads), relation(v_BTD, v_BTD, self.relation_heads)


def published_losses(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    """KL(teacher || student) of stored relations (B, M, T, T): summed over keys, mean over the rest; Q-K, then V-V."""
    compare = nn.KLDivLoss(reduction="none")
    with record_function("loss"):
        return [compare(s.log(), t).sum(-1).mean() for s, t in zip(student, teacher, strict=True)]


class PublishedStep:
    """One optimizer step after another.

    Args:
        student: In training mode, on its device.
        teacher: Frozen, on the same device.
        lr: Learning rate.
        device: "cpu" or "cuda".
    """

    def __init__(self, student: PublishedViT, teacher: PublishedViT, *, lr: float, device: str) -> None:
        self.student, self.teacher, self.device = student, teacher.eval().requires_grad_(False), device
        trained = [p for p in student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    def losses(self, student_images: Tensor, teacher_images: Tensor) -> list[Tensor]:
        """The two losses of normalised images (B, 3, S, S) on the device."""
        with torch.autocast("cuda", torch.float16) if self.device == "cuda" else nullcontext():
            with torch.no_grad():
                taught = self.teacher(teacher_images)
            return published_losses(self.student(student_images), taught)

    def __call__(self, student_images: Tensor, teacher_images: Tensor) -> float:
        """Forward, backward and update on normalised images (B, 3, S, S) of the host; returns the loss."""
        views = [x.to(self.device, non_blocking=True) for x in (student_images, teacher_images)]
        qk, vv = self.losses(*views)
        loss = qk + vv
        values = [loss.item(), qk.item(), vv.item()]
        if not math.isfinite(values[0]):
            raise FloatingPointError(f"the published step's loss is {values[0]}")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        torch.norm(torch.stack([torch.norm(grad) for grad in grads]))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return values[0]


class PublishedPhotos(Dataset[tuple[Tensor, Tensor]]):
    """(student's view, teacher's view), each (3, S, S) float32 and normalised, of one crop of a photo."""

    def __init__(self, photos: Sequence[Path], img_size: int) -> None:
        self.photos = list(photos)
        self.shared = transforms.Compose(
            [
                transforms.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
            ]
        )
        plain = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.teacher = transforms.Compose(plain)
        self.student = transforms.Compose([transforms.ColorJitter(0.4, 0.4, 0.4), *plain])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.photos[index]) as photo:
            image = self.shared(photo.convert("RGB"))
        return self.student(image), self.teacher(image)


def published_loader(photos: Sequence[Path], *, img_size: int, batch: int, workers: int, device: str) -> DataLoader:
    """Shuffled batches of both views; the workers start anew every epoch."""
    return DataLoader(
        PublishedPhotos(photos, img_size),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device == "cuda",
    )
