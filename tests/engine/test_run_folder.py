"""The run folder's parts that engine and seg share: signals, metrics, checkpoints, bad batches, damaged photos."""

import json
import os
import signal
import time

import pytest
import torch

from tinymim.engine.cost import TrainingCost
from tinymim.engine.run_folder import DamagedPhotos, RunFolder, dump_bad_batch, on_first_process, stop_signals
from tinymim.errors import CheckpointError, ConfigError, TinyMIMError


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_the_first_signal_asks_and_the_second_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:  # noqa: PT012
        assert not stop
        send(signal.SIGTERM)
        assert stop
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().out.count("press Ctrl-C again to stop at once") == 1


def test_two_signals_within_the_grace_count_as_one(capfd):
    """``timeout`` sends SIGTERM to its child and to the group."""
    with pytest.raises(KeyboardInterrupt), stop_signals("", grace=0.3) as stop:  # noqa: PT012
        send(signal.SIGTERM)
        first = stop.since
        send(signal.SIGTERM)
        assert stop.since == first
        time.sleep(0.3)
        send(signal.SIGTERM)
    assert capfd.readouterr().out == ""


def test_a_forked_worker_stops_at_the_first_signal():
    with stop_signals(""):
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(("kind", "name"), [("step", "step_{:08d}.pth"), ("iter", "iter_{}.pth")])
def test_checkpoints_sort_by_step_and_rotate(tmp_path, capsys, kind, name):
    folder = RunFolder(tmp_path, kind)
    assert folder.newest() is None
    assert "stopped before its first checkpoint" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    for step in (2, 90, 1000):
        assert folder.checkpoint(step).name == name.format(step)
        torch.save({"step": step}, folder.checkpoint(step))
        folder.rotate(folder.checkpoint(step))
    (tmp_path / "checkpoints" / f"{kind}_note.pth").touch()
    assert folder.checkpoints() == [folder.checkpoint(90), folder.checkpoint(1000)]
    assert folder.newest() == folder.checkpoint(1000)
    assert "resuming at step 1000" in capsys.readouterr().out
    folder.checkpoint(5).touch()  # written after a resume from an older copy: it stays
    folder.rotate(folder.checkpoint(5))
    assert folder.checkpoints() == [folder.checkpoint(5), folder.checkpoint(1000)]


def test_metrics_are_cut_where_training_goes_on(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (0, 1, 2, 3):
        folder.log({"step": step, "loss": 0.1 + step})
    with open(folder.metrics, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    kept = folder.metrics.read_text().splitlines()[:3]
    assert folder.log_until(2) == [json.loads(text) for text in kept]
    assert folder.metrics.read_text().splitlines() == kept
    assert folder.log_until(0) == []
    assert folder.metrics.read_text() == ""


@pytest.mark.parametrize("damage", ["empty", "cut short", "zeros", "garbage", "one byte"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path, capsys, damage):
    folder = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()

    def save(step):
        torch.save({"step": step, "weights": torch.arange(1000.0)}, folder.checkpoint(step))

    def spoil(step):
        whole = folder.checkpoint(step).read_bytes()
        flipped = bytearray(whole)
        flipped[whole.index(torch.arange(1000.0).numpy().tobytes()) + 17] ^= 1
        folder.checkpoint(step).write_bytes(
            {
                "empty": b"",
                "cut short": whole[: len(whole) // 2],
                "zeros": bytes(len(whole)),
                "garbage": bytes(range(256)) * 20,
                "one byte": bytes(flipped),
            }[damage]
        )

    save(4)
    save(6)
    spoil(6)
    assert folder.newest() == folder.checkpoint(4)
    said = capsys.readouterr().out
    assert "step_00000006.pth is damaged" in said
    assert "resuming at step 4" in said
    assert folder.checkpoints() == [folder.checkpoint(4)]
    spoil(4)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: step_00000004\.pth"):
        folder.newest()
    assert folder.checkpoints() == [folder.checkpoint(4)]  # nothing is removed where nothing is whole


def test_a_folder_removed_meanwhile_is_said_and_not_made_again(tmp_path):
    folder = RunFolder(tmp_path / "gone")
    for act in (folder.check_here, lambda: folder.log({"step": 1})):
        with pytest.raises(TinyMIMError, match="gone is gone"):
            act()
    assert not folder.path.exists()


def test_metrics_with_zeros_and_other_bytes_are_cut(tmp_path):
    """What a power cut leaves: blocks of zeros, bytes that are no text."""
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "loss": 0.5})
    with open(folder.metrics, "ab") as file:
        file.write(b"\0" * 100 + b"\n\xff\xfe\n[1]\nnull\n" + b"[" * 5000)
    assert folder.log_until(9) == [{"step": 1, "loss": 0.5}]
    assert folder.metrics.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_metrics_that_cannot_be_written_are_our_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TinyMIMError, match=r"cannot write .*metrics\.jsonl"):
        RunFolder(tmp_path).log({"step": 1})


def test_a_bad_batch_loads_with_weights_only(tmp_path):
    image = torch.ones(2, 3, requires_grad=True) * 2
    path = dump_bad_batch(tmp_path / "bad.pth", 4, batch={"image": image.detach()}, files=["a.jpg", None])
    content = torch.load(path, weights_only=True)
    assert (content["step"], content["files"]) == (4, ["a.jpg", None])
    assert torch.equal(content["batch"]["image"], image)


def test_damaged_photos_are_named_once_and_counted(capsys):
    photos = DamagedPhotos()
    assert photos.summary() == ""
    for batch in (["a.jpg"], [], ["a.jpg", "b.jpg"]):
        photos.note(batch)
    said = capsys.readouterr().out
    assert said.count("skipped damaged photo a.jpg (another one is used; 1 so far)") == 1
    assert said.count("skipped damaged photo b.jpg (another one is used; 2 so far)") == 1
    assert photos.summary() == "warning: 2 damaged photo(s) skipped, 3 times in all"


def test_the_first_processs_error_keeps_its_class_and_parts():
    def refuse():
        raise ConfigError("what", "why", "fix")

    with pytest.raises(ConfigError) as caught:
        on_first_process(refuse)
    assert (caught.value.what, caught.value.why, caught.value.fix) == ("what", "why", "fix")
    assert on_first_process(lambda: (1, 2)) == (1, 2)


def test_the_cost_of_a_run_is_what_its_numbers_multiply_to():
    cost = TrainingCost(
        parameters=2_500_000,
        bytes_per_image=3 << 20,
        gib=1.25,
        flop_per_image=4e12,
        backward_flop_per_image=2e12,
        seconds_per_image=0.5,
        batch=8,
        processes=2,
        steps=450,
        size=(64, 96),
        device="cpu",
    )
    said = str(cost)
    assert cost.images == 7200
    for words in (
        "450 steps of 8 images of 64x96 on each of 2 process(es)",
        "2.50 M trained parameters; about 1.2 GiB per process (3.0 MiB per image)",
        "about 1.0 hours on one cpu like this (2.00 images/s",
        "4000.0 GFLOP per image",
        "0.0288 EFLOP; on paper, on 8 GPUs: V100 minutes, A100 minutes, H100 minutes (assumed: 40% of the peaks",
    ):
        assert words in said
