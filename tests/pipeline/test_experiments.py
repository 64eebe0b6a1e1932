"""dvc's own experiment commands on this pipeline, through the real command line."""

import json

import pytest

from tests.pipeline.clone import Clone, ran


def test_an_experiment_from_a_changed_param_to_its_place_in_the_tables(tried: Clone) -> None:
    assert "learning_rate: 2e-05" in (tried.path / "params.yaml").read_text(encoding="utf-8")
    assert "# rows per update" in (tried.path / "params.yaml").read_text(encoding="utf-8"), "comments were lost"

    changed = json.loads(tried.run("dvc", "params", "diff", "--json"))
    assert changed["params.yaml"]["train.learning_rate"] == {"old": 2e-3, "new": 2e-5, "diff": 2e-5 - 2e-3}
    assert set(changed["params.yaml"]) == {"train.learning_rate"}

    metrics = json.loads(tried.run("dvc", "metrics", "diff", "--json"))
    assert metrics["metrics/evaluate.json"]["nll"]["diff"] != 0
    assert set(metrics) == {"metrics/evaluate.json"}, "the one metric file"
    assert len(metrics["metrics/evaluate.json"]) <= 8

    table = tried.run("dvc", "exp", "show", "--csv")
    assert "slower" in table
    assert "exact_match" in table

    # The commit, the experiment by its name, and the workspace, which is the experiment.
    compared = tried.run("python", "-m", "tools.compare", "HEAD", "slower")
    assert compared == tried.run("python", "-m", "tools.compare", "HEAD").replace("workspace", "   slower")
    assert metrics["metrics/evaluate.json"]["nll"]["new"] == pytest.approx(float(compared.split("nll", 1)[1].split()[1]), abs=1e-4)

    tried.run("dvc", "plots", "show", "--out", "plots")
    page = (tried.path / "plots" / "index.html").read_text(encoding="utf-8")
    assert "train_loss" in page
    assert "eval_loss" in page


def test_a_temporary_experiment_leaves_the_workspace_alone(built: Clone) -> None:
    """tests/pipeline/test_grid.py has the queue's. What is changed makes the same adapter, so that only `train` runs."""
    output = built.run("dvc", "exp", "run", "--temp", "--name", "other", "-S", "train.early_stopping_patience=9")
    assert ran(output) == {"train"}
    assert built.run("git", "status", "--porcelain") == ""
    assert "other" in built.run("dvc", "exp", "show", "--csv")
    assert len(list((built.path / ".dvc/tmp/throughput").glob("*.json"))) == 1, "the times of the run are kept"


def test_the_flags_of_a_recipe_are_accepted_by_dvc(built: Clone) -> None:
    flags = built.run("python", "-m", "tools.recipes", "flags", "tiny-cpu")
    built.run("sh", "-c", f"dvc exp run --queue {flags}")
    built.run("dvc", "queue", "remove", "--all")
    built.run("python", "-m", "tools.recipes", "use", "tiny-cpu")
    assert "train_file: data/raw/tiny" in (built.path / "params.yaml").read_text(encoding="utf-8")


def test_what_was_run_once_comes_back_from_the_run_cache(built: Clone, tried: Clone) -> None:
    """DVC keeps no run of a stage with a plain output outside its cache: the reports in Git must be metrics or plots."""
    tried.set(data__validation_fraction=0.3)
    assert tried.repro("prepare") == {"prepare"}
    assert tried.outputs() != built.outputs()
    tried.set(train__learning_rate=2e-3, data__validation_fraction=0.2)
    output = tried.run("dvc", "repro")
    assert ran(output) == set()
    assert all(f"Stage '{stage}' is cached - skipping run" in output for stage in ("prepare", "train", "predict", "evaluate"))
    assert tried.outputs() == built.outputs()
