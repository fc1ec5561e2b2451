"""What ``tinymim list`` tells of models and teachers, kept here so that it answers at once and without PyTorch.

Tests compare every row with the model that is built: add here what becomes available there.
"""

from typing import NamedTuple


class Listed(NamedTuple):
    """A model of ours, without a head; its parameters in millions."""

    name: str
    width: int
    heads: int
    blocks: int
    millions: float


class ListedTeacher(NamedTuple):
    """A teacher by timm's name; ``target_block`` is read by default (from 1), ``licence`` is that of the weights."""

    name: str
    width: int
    heads: int
    blocks: int
    patch: int
    target_block: int
    licence: str


MODELS = (
    Listed("tinymim_vit_tiny", 192, 3, 12, 5.5),
    Listed("tinymim_vit_small", 384, 6, 12, 21.7),
    Listed("tinymim_vit_base", 768, 12, 12, 85.8),
    Listed("tinymim_vit_star_tiny", 192, 12, 12, 5.8),
)
BACKBONES = (  # by timm's names
    "hiera_base_224",
    "hiera_base_abswin_256",
    "hiera_base_plus_224",
    "hiera_huge_224",
    "hiera_large_224",
    "hiera_small_224",
    "hiera_small_abswin_256",
    "hiera_tiny_224",
    "swin_base_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224",
    "swin_large_patch4_window12_384",
    "swin_s3_base_224",
    "swin_s3_small_224",
    "swin_s3_tiny_224",
    "swin_small_patch4_window7_224",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "tiny_vit_11m_224",
    "tiny_vit_21m_224",
    "tiny_vit_21m_384",
    "tiny_vit_21m_512",
)
TEACHERS = (  # any other model of their classes works, too
    ListedTeacher("vit_base_patch16_224.mae", 768, 12, 12, 16, 12, "cc-by-nc-4.0"),
    ListedTeacher("vit_large_patch16_224.mae", 1024, 16, 24, 16, 18, "cc-by-nc-4.0"),
    ListedTeacher("vit_huge_patch14_224.mae", 1280, 16, 32, 14, 32, "cc-by-nc-4.0"),
    ListedTeacher("deit_base_distilled_patch16_224.fb_in1k", 768, 12, 12, 16, 12, "apache-2.0"),
    ListedTeacher("beit_base_patch16_224.in22k_ft_in22k", 768, 12, 12, 16, 12, "apache-2.0"),
    ListedTeacher("beitv2_base_patch16_224.in1k_ft_in22k", 768, 12, 12, 16, 12, "apache-2.0"),
    ListedTeacher("beitv2_large_patch16_224.in1k_ft_in22k", 1024, 16, 24, 16, 18, "apache-2.0"),
    ListedTeacher("eva02_base_patch14_224.mim_in22k", 768, 12, 12, 14, 12, "mit"),
    ListedTeacher("eva02_large_patch14_224.mim_in22k", 1024, 16, 24, 14, 18, "mit"),
    ListedTeacher("vit_small_patch14_reg4_dinov2.lvd142m", 384, 6, 12, 14, 12, "apache-2.0"),
    ListedTeacher("vit_base_patch14_reg4_dinov2.lvd142m", 768, 12, 12, 14, 12, "apache-2.0"),
    ListedTeacher("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 16, 24, 14, 18, "apache-2.0"),
    ListedTeacher("vit_small_patch16_dinov3.lvd1689m", 384, 6, 12, 16, 12, "dinov3-license"),
    ListedTeacher("vit_base_patch16_dinov3.lvd1689m", 768, 12, 12, 16, 12, "dinov3-license"),
    ListedTeacher("vit_large_patch16_dinov3.lvd1689m", 1024, 16, 24, 16, 18, "dinov3-license"),
    ListedTeacher("vit_base_patch16_clip_quickgelu_224.openai", 768, 12, 12, 16, 12, "apache-2.0"),
    ListedTeacher("vit_large_patch14_clip_quickgelu_224.openai", 1024, 16, 24, 14, 18, "apache-2.0"),
    ListedTeacher("vit_base_patch16_siglip_224.webli", 768, 12, 12, 16, 12, "apache-2.0"),
    ListedTeacher("samvit_base_patch16.sa1b", 768, 12, 12, 16, 12, "apache-2.0"),
    ListedTeacher("samvit_large_patch16.sa1b", 1024, 16, 24, 16, 18, "apache-2.0"),
)
