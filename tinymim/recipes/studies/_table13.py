"""Rows of table 13: drop path of teacher and student, constant in every block."""

paper = dict(table=13, metric="ImageNet-1k top-1, ViT-B, 100 epochs", note="Teacher 0, student 0.1 is the default")
cells = [
    dict(
        name=f"teacher {teacher}, student {student}",
        paper=top1,
        set={"distill.cfg_options.teacher_drop_path": teacher, "distill.cfg_options.drop_path": student},
    )
    for teacher, student, top1 in [
        (0.0, 0.0, 84.3),
        (0.0, 0.1, 84.6),
        (0.0, 0.2, 84.3),
        (0.0, 0.3, 84.1),
        (0.1, 0.1, 83.9),
    ]
]
