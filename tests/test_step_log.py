"""The option `run_log`: an optimizer's metrics on the disk, from inside its step."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from automagic_bnb import Automagic8bit
from automagic_bnb.run_log import FILE_NAME, read_run


def trained(
    folder: Path, steps: int, opt: Automagic8bit | None = None, one_by_one: bool = False, **options: int
) -> Automagic8bit:
    if opt is None:
        opt = Automagic8bit([torch.nn.Parameter(torch.ones(16, 16)) for _ in range(2)], run_log=folder, **options)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = p.detach().clone()
                if one_by_one:
                    opt.step_parameter(p, group)
        if not one_by_one:
            opt.step()
    return opt


def test_every_tenth_step_leaves_its_metrics(tmp_path: Path) -> None:
    opt = trained(tmp_path / "run", 25)
    rates = read_run(tmp_path / "run").series["lr/mean"]
    assert rates.steps.tolist() == [10, 20]
    assert opt.get_metrics().keys() >= read_run(tmp_path / "run").series.keys()
    assert rates.values[-1] == pytest.approx(float(opt.get_avg_learning_rate()), rel=2)


def test_of_as_many_steps_as_are_asked_for(tmp_path: Path) -> None:
    trained(tmp_path, 6, run_log_every=2)
    assert read_run(tmp_path).series["lr/mean"].steps.tolist() == [2, 4, 6]


def test_parameters_stepped_one_at_a_time_make_steps(tmp_path: Path) -> None:
    """A step ends when the first parameter comes again."""
    trained(tmp_path, 7, one_by_one=True, run_log_every=3)
    assert read_run(tmp_path).series["lr/mean"].steps.tolist() == [3, 6]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    first = trained(tmp_path, 5, run_log_every=2)
    saved = copy.deepcopy(first.state_dict())
    second = Automagic8bit(
        [torch.nn.Parameter(torch.ones(16, 16)) for _ in range(2)], run_log=tmp_path, run_log_every=2
    )
    second.load_state_dict(saved)
    trained(tmp_path, 3, second)
    assert read_run(tmp_path).series["lr/mean"].steps.tolist() == [2, 4, 6, 8]


def test_copies_and_pickles_take_no_open_file(tmp_path: Path) -> None:
    opt = trained(tmp_path, 10)
    trained(tmp_path, 1, copy.deepcopy(opt))
    trained(tmp_path, 1, pickle.loads(pickle.dumps(opt)))


def test_what_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="run_log"):
        opt = trained(tmp_path / "file", 20)
    assert all(state["step"] == 20 for state in opt.state.values())


def test_without_the_option_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opt = Automagic8bit([torch.nn.Parameter(torch.ones(16, 16))])
    trained(tmp_path, 10, opt)
    assert not list(tmp_path.rglob(FILE_NAME))


@pytest.mark.parametrize("value", [3, True, b"folder"])
def test_what_is_no_folder_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="run_log"):
        Automagic8bit([torch.nn.Parameter(torch.ones(4))], run_log=value)
