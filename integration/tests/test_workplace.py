"""The hidden folder of a job, and processes of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tersor.integration.errors import UserError
from tersor.integration.workplace import publish, remembered, work_folder


def failing_run(out: Path, job: dict[str, int], before: Callable[[Path], object]) -> None:
    with work_folder(out, job) as work:
        before(work)
        raise ValueError("NaN")


def test_a_failure_before_the_first_stage_leaves_nothing(tmp_path):
    def half_a_stage(work: Path) -> None:
        (work / "result.unfinished").mkdir()
        (work / "result.unfinished" / "model.safetensors").touch()

    with pytest.raises(ValueError, match="NaN"):
        failing_run(tmp_path / "out", {}, half_a_stage)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_a_stage_keeps_it_for_the_same_job_only(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        failing_run(tmp_path / "out", {"bits": 4}, lambda work: remembered(work / "before.json", lambda: 1))
    with work_folder(tmp_path / "out", {"bits": 4}) as work:
        assert remembered(work / "before.json", lambda: 2) == 1
    with work_folder(tmp_path / "out", {"bits": 3}) as work:
        assert remembered(work / "before.json", lambda: 2) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
@pytest.mark.parametrize("other", [{"bits": 4}, {"bits": 3}], ids=["same job", "another job"])
def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path, other):
    with work_folder(tmp_path / "out", {"bits": 4}) as work:
        remembered(work / "before.json", lambda: 1)
        with (
            pytest.raises(UserError, match=r"another process works in .*\.out\.partial"),
            work_folder(tmp_path / "out", other),
        ):
            pass
        assert remembered(work / "before.json", lambda: 2) == 1
    with work_folder(tmp_path / "out", other):
        pass


def test_what_an_earlier_kill_has_left_of_a_replaced_target_is_no_obstacle(tmp_path):
    out = tmp_path / "out"
    with work_folder(out, {}) as work:
        for folder, name in ((work / "replaced", "oldest"), (out, "old"), (work / "result", "new")):
            folder.mkdir()
            (folder / name).touch()
        publish(work, work / "result", out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


WAITS = """
import time
from tersor.integration.worker import run_apart

def wait(progress):
    print("begun", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    run_apart(wait, progress=print)
"""


def test_a_process_apart_ends_with_one_that_is_killed(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    process = subprocess.Popen([sys.executable, tmp_path / "waits.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.kill()
    # the end of what is printed: nobody holds the pipe any more
    process.communicate(timeout=30)
