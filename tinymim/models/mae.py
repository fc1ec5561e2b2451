"""Masked autoencoder (arXiv 2111.06377) on the same ViT: random masking, a light decoder, normalised pixel targets.

Legend: B = batch, N = patches, V = visible patches, D = encoder width, E = decoder width, P = patch_size**2 * 3.
"""

import torch
from torch import Tensor, nn

from tinymim.models.draws import draw_orders
from tinymim.models.position import resize_position, sincos_position
from tinymim.models.tokens import keep_patches
from tinymim.models.vit import Block, ViT, _init_weights


class MAE(nn.Module):
    """Pre-training wrapper; keep ``encoder`` afterwards.

    Args:
        encoder: The ViT to pre-train. Its positions are frozen here; its distillation token must be off.
        decoder_dim: Decoder width E.
        decoder_depth: Decoder blocks.
        decoder_heads: Decoder heads.
        mask_ratio: Share of patches that are masked.
        norm_pix: Normalise every target patch to zero mean and unit (unbiased) variance.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.mask_ratio, self.norm_pix = encoder, mask_ratio, norm_pix
        encoder.pos_embed.requires_grad_(False)
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, 4.0, grid=None, num_prefix=1, init_values=None, drop_path=0.0)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_size**2 * 3)
        self.decoder_pos_embed: Tensor
        self.register_buffer("decoder_pos_embed", sincos_position(encoder.grid_size, decoder_dim), persistent=False)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(_init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), H and W multiples of the patch -> (B, N, P), pixels ordered (row, column, channel)."""
        p = self.encoder.patch_size
        B, _, H, W = images.shape
        x = images.reshape(B, 3, H // p, p, W // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * 3)

    def encode(self, images: Tensor, ids_keep_BV: Tensor) -> Tensor:
        """Encode visible patches only -> (B, 1 + V, D) after the final norm."""
        x_BTD, grid = self.encoder.embed(images)
        x_BTD = keep_patches(x_BTD, ids_keep_BV, 1)
        for i in range(self.encoder.depth):
            x_BTD = self.encoder.run_block(i, x_BTD, grid, None)
        return self.encoder.norm(x_BTD)

    def decode(self, x_BVD: Tensor, ids_restore_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Visible tokens (B, 1 + V, D) and the order that restores the patches -> predicted patches (B, N, P)."""
        x_BVE = self.decoder_embed(x_BVD)
        B, N = ids_restore_BN.shape
        hidden = self.mask_token.expand(B, N + 1 - x_BVE.shape[1], -1).to(x_BVE.dtype)
        x_BNE = torch.cat([x_BVE[:, 1:], hidden], dim=1)
        x_BNE = x_BNE.gather(1, ids_restore_BN.unsqueeze(-1).expand(-1, -1, x_BNE.shape[-1]))
        x_BTE = torch.cat([x_BVE[:, :1], x_BNE], dim=1)
        x_BTE = x_BTE + resize_position(self.decoder_pos_embed, self.encoder.grid_size, grid, 1)
        for block in self.decoder_blocks:
            x_BTE = block(x_BTE, grid)
        return self.decoder_pred(self.decoder_norm(x_BTE))[:, 1:]

    def losses(self, images: Tensor, ids_shuffle_BN: Tensor | None = None) -> dict[str, Tensor]:
        """Reconstruction error of the masked patches.

        Args:
            images: (B, 3, H, W), normalised, H and W multiples of the patch.
            ids_shuffle_BN: A permutation of the patches of each image, the first V are visible; None draws one.

        Returns:
            ``pixel`` and ``loss`` (the same scalar).
        """
        p = self.encoder.patch_size
        B, N = len(images), (images.shape[2] // p) * (images.shape[3] // p)
        if ids_shuffle_BN is None:
            ids_shuffle_BN = draw_orders(B, N, images.device)
        visible = max(int(N * (1 - self.mask_ratio)), 1)
        loss = self.pixel_loss(images, self.encode(images, ids_shuffle_BN[:, :visible]), ids_shuffle_BN)
        return {"pixel": loss, "loss": loss}

    def pixel_loss(self, images: Tensor, x_BVD: Tensor, ids_shuffle_BN: Tensor) -> Tensor:
        """Reconstruction error from encoded visible patches (B, 1 + V, D), the first V of ``ids_shuffle_BN``."""
        target_BNP = self.patchify(images).float()
        ids_restore_BN = ids_shuffle_BN.argsort(dim=1)
        p = self.encoder.patch_size
        grid = (images.shape[2] // p, images.shape[3] // p)
        pred_BNP = self.decode(x_BVD, ids_restore_BN, grid).float()
        if self.norm_pix:
            var, mean = torch.var_mean(target_BNP, dim=-1, keepdim=True)
            target_BNP = (target_BNP - mean) / (var + 1e-6).sqrt()
        masked_BN = (ids_restore_BN >= x_BVD.shape[1] - 1).float()
        return ((pred_BNP - target_BNP).square().mean(-1) * masked_BN).sum() / masked_BN.sum()

    def forward(self, images: Tensor, ids_shuffle_BN: Tensor | None = None) -> dict[str, Tensor]:
        """Same as :meth:`losses`."""
        return self.losses(images, ids_shuffle_BN)
