"""Studies: data only, one file per table of the paper; ``_small``: with small photos, in minutes per cell.

Your own study is such a file::

    title = "Rates of distillation"
    stages = dict(
        distill=dict(verb="distill", teacher="timm/vit_base_patch16_224.mae", data="{photos}", seed="{seed}"),
        finetune=dict(verb="finetune", student="{distill.student}", data="{photos}", val_data="{val_photos}"),
    )
    grid = {"distill.lr": [5e-4, 1e-3], "distill.cfg_options.drop_path": [0.0, 0.1]}  # every combination is a cell
    cells = [dict(name="features", set={"distill.targets": ["qkv"]})]  # and these
    seeds = [0, 1, 2]
    score = "finetune.top1"

Stages are commands with their long options; ``{stage.student}`` is the student of another stage, ``{photos}``,
``{val_photos}``, ``{segments}`` are the folders given to ``tinymim study``. ``_base_ = "./OTHER.py"`` inherits a file.
"""
