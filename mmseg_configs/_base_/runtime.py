# Shared by all runs: loops with exact resume, the run folder, the plug-in, seeds.
train_cfg = dict(type="ResumableTrainLoop")
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=None,  # RunFolderHook writes metrics.jsonl and the progress line
    checkpoint=dict(type="RunFolderHook", interval=1000, keep=2, log_interval=10),
)
custom_imports = dict(imports=["tinymim.seg"], allow_failed_imports=False)
default_scope = "mmseg"
tta_model = dict(type="SegTTAModel")
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
randomness = dict(seed=0)
log_level = "ERROR"  # RunFolderHook prints what matters; "INFO" shows MMEngine's log
load_from = None
resume = False
