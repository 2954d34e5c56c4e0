"""The study on a small data set of its own: what is planned, that it goes on where it stopped, and its tables."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study import digits
from benchmarks.study import report as study_report
from benchmarks.study import runs as study
from lora_edge.har.data import load_npz, split
from lora_edge.methods import methods

PEOPLE = (1, 2, 3, 4, 5)
METHODS = ("full", "head_only", "lora_edge")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five people, three classes, windows of 20 samples that half overlap."""
    random = np.random.default_rng(0)
    people, classes, count = len(PEOPLE), 3, 12
    y = np.tile(np.repeat(np.arange(classes), count), people)
    subject = np.repeat(PEOPLE, classes * count)
    wave = np.sin(np.arange(20) * (1 + y[:, None]) / 3)[:, None, :] * (1 + 0.2 * subject[:, None, None])
    x = (wave + 0.3 * random.standard_normal((len(y), 4, 20))).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, X=x, y=y, subject=subject)
    return path


@pytest.fixture
def small(data, tmp_path, monkeypatch) -> study.Study:
    monkeypatch.setattr(study, "STEPS", 6)
    monkeypatch.setattr(study, "LONG_STEPS", 8)
    problem = study.Activities(str(data), "A", tmp_path / "sources", PEOPLE, epochs=1)
    return study.Study(problem, tmp_path / "rows.csv", seeds=1, methods=METHODS)


def test_a_persons_rate_comes_from_two_others(small):
    for person in PEOPLE:
        judges = small.problem.judges(person)
        assert person not in judges
        assert len(judges) == 2
    rows = [
        {"stage": "search", "method": "full", "rank": "2", "person": str(p), "lr": str(lr), "f1": str(f1)}
        for p, lr, f1 in [
            (1, 0.1, 0.9),
            (2, 0.1, 0.1),
            (1, 0.2, 0.6),
            (2, 0.2, 0.6),
            (3, 0.1, 1.0),
            (4, 0.1, 1.0),
            (3, 0.2, 0.0),
        ]
    ]
    assert study.chosen_rate(rows, "full", 2, small.problem.judges(5)) == 0.2
    assert study.chosen_rate(rows, "full", 2, small.problem.judges(1)) == 0.1
    with pytest.raises(ValueError, match=r"no search rows of full at rank 1 on people \(1, 2\); run the stage search first"):
        study.chosen_rate(rows, "full", 1, (1, 2))
    assert all(len(set(study.rates(method))) == 5 for method in methods().values())


def test_it_goes_on_where_it_stopped(small, monkeypatch):
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if len(said) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run_study(small, tell)
    before = study.read_rows(small.rows)
    assert 0 < len(before) < 30
    count = study.run_study(small, lambda line: None)
    rows = study.read_rows(small.rows)
    assert rows[: len(before)] == before
    assert len(rows) == len(before) + count == len({study.key_of(row) for row in rows})
    assert study.run_study(small, print) == 0
    searched, compared = 4 * len(METHODS) * 5, len(PEOPLE) * len(METHODS)
    rated = len(PEOPLE) * 5
    assert len(rows) == searched + len(PEOPLE) + compared * (1 + 1 + 1 + len(study.SHARES)) + rated + len(METHODS)
    assert {row["lr"] for row in rows if row["stage"] == "study" and row["method"] == "full"} <= {
        "0.0001",
        "0.0003",
        "0.001",
        "0.003",
        "0.01",
    }

    picture = small.rows.with_suffix(".png")
    page = small.rows.with_suffix(".md")
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["study_report", str(small.rows), "--picture", str(picture), "--page", str(page)])
    assert study_report.main() == 0
    written = page.read_text()
    for part in (
        "before\n",
        "| full fine-tuning | 5 |",
        "| zero-shot | 5 |",
        "| LoRA-Edge, no search | 5 | 0.02 |",
        "8 steps",
        "\nafter",
    ):
        assert part in written
    assert "old" not in written
    assert study_report.main() == 0
    assert page.read_text() == written
    assert picture.stat().st_size > 1000
    full = study_report.summaries(rows)["full"]
    assert full.step_over_full == 1.0
    assert full.times_shorter(full) == pytest.approx([1.0] * len(PEOPLE), rel=0.5)  # its own set-up is in its time
    assert small.rows.with_suffix(".png").stat().st_size > 1000


def test_a_method_at_its_own_rate_needs_no_search(small):
    asked = replace(small, methods=("bn_only", "lora_edge_batch_bn"), stages=("own_rate",))
    runs = list(study.planned(asked, list))
    assert {(run.method, run.lr) for run in runs} == {("bn_only", 1e-2), ("lora_edge_batch_bn", 2e-2)}
    assert [run.person for run in runs if run.method == "bn_only"] == list(PEOPLE)


def test_another_network(data, tmp_path):
    model = "lora_edge.har.models:TResNet"
    problem = study.Activities(str(data), "A", tmp_path / "sources", PEOPLE, epochs=1, model=model)
    assert problem.name == "small_TResNet"
    _, network = problem.task(study.Run("study", 1, 0, "full", 2, 1e-3, 50), lambda line: None)
    assert type(network).__name__ == "TResNet"


def test_few_windows_of_each_recording(data):
    task = split(load_npz(data), 1)
    fewest = study.few_shot(task, 0.01).adapt
    assert sorted(fewest.y.tolist()) == [0, 1, 2]
    assert len(fewest) < len(study.few_shot(task, 0.2).adapt) < len(task.adapt)


def test_digits_of_search_and_study_are_apart(monkeypatch):
    """Each digit's own number stands in its image, so that the parts of the splits can be told."""
    x = torch.zeros(5000, 3, 32, 32)
    x[:, 0, 0, 0] = torch.arange(5000)
    y = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(digits, "load_digits", lambda path: (x, y))
    monkeypatch.setattr(digits, "load_weights", lambda model, path: None)
    problem = digits.Digits(500, Path("svhn.pth"), Path("digits.csv.gz"))
    seen = {"search": set(), "study": set()}
    for stage, numbers in seen.items():
        for draw in problem.people:
            run = study.Run(stage, draw, 0, "full", 8, 1e-3, 50)
            task, model = problem.task(run, print)
            assert np.bincount(task.adapt.y).tolist() == [50] * 10
            parts = [set(part.x[:, 0, 0, 0].astype(int)) for part in (task.adapt, task.test)]
            assert not parts[0] & parts[1]
            numbers |= parts[0] | parts[1]
    assert not seen["search"] & seen["study"]
    assert sum(p.numel() for p in model.parameters()) == 815_018


def test_bad_input(small):
    with pytest.raises(ValueError, match="there is no method 'nothing'; give some of bias_only, bn_only"):
        replace(small, methods=("nothing",)).chosen()
    with small.rows.open("w") as file:
        csv.DictWriter(file, study.FIELDS).writeheader()
    with pytest.raises(ValueError, match=r"no rows of the stage study; run benchmarks\.study first"):
        study_report.report([small.rows])
    search = {"stage": "search", "method": "lora_edge", "rank": "2", "lr": "0.02", "f1": "0.5"}
    study.append_row(small.rows, {**dict.fromkeys(study.FIELDS, ""), **search})
    with pytest.raises(ValueError, match="no rows of the stage study"):
        study_report.report([small.rows])
    with pytest.raises(ValueError, match="the page must hold <!-- results --> and <!-- end of results --> once each"):
        study_report.replace_between_marks("no marks", "text")


def test_times_shorter_counts_where_there_is_something_to_shorten():
    """Person 1's untouched model is at the target, person 4 never gets there with this method."""
    full = study_report.Summary(
        "full", steps={(1, 0): 0, (2, 0): 10, (3, 0): 4, (4, 0): 6}, step_seconds=0.1, step_over_full=1.0
    )
    own = study_report.Summary("lora_edge", steps={(1, 0): 2, (2, 0): 5, (3, 0): 0, (4, 0): None}, setup_seconds=0.2)
    assert own.times_shorter(full) == []
    own.step_seconds, own.step_over_full = 0.05, 0.5
    assert own.times_shorter(full) == pytest.approx([10 / (2 + 2.5), 4 / 2])
    assert own.shorter_in_total(full) == pytest.approx((0 + 10 + 4) / (2 + 1 + 2 + 2.5 + 2))
    assert full.times_shorter(full) == [1.0, 1.0, 1.0]


def test_interval():
    middle, half = study_report.interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(2.484, abs=1e-3)  # t(2, 97.5 %) = 4.303 on a standard error of 1 / sqrt(3)


def test_the_table_of_rates():
    def row(person: int, rank: int, lr: float, f1: float, stage: str = "rates", method: str = "lora_edge") -> dict[str, str]:
        return {
            "stage": stage, "method": method, "rank": str(rank), "person": str(person), "seed": "0",
            "lr": str(lr), "f1": str(f1),
        }  # fmt: skip

    own = methods()["lora_edge"].lr
    rows = [row(1, 2, own, 0.5), row(2, 2, own, 0.7), row(1, 2, 0.1, 0.6), row(2, 2, 0.1, 0.9)]
    searched = [row(1, 2, own, 0.0, "search"), row(1, 16, own, 0.3, "search")]
    searched += [row(1, 2, own, 0.4, "search", "lora_edge_as_worn")]
    text = study_report.rates_table({"A": [*rows, *searched], "B": [{"stage": "study"}]})
    assert text.splitlines()[2:] == [
        "| study | method | rank | runs | 0.02 | 0.1 | own minus best, points |",
        "|---|---|---|---|---|---|---|",
        "| A | LoRA-Edge | 2 | 2 | 0.600 | **0.750** | -15.0 ± 63.5 |",
        "| A | LoRA-Edge | 16 | 1 | **0.300** | - | - |",
        "| A | LoRA-Edge, axes as worn | 2 | 1 | **0.400** | - | - |",
    ]
    assert study_report.rates_table({"B": [{"stage": "study"}]}) == ""


def test_the_committed_rows_keep_the_aims():
    """What issues 2 and 7 ask of the watch data; the README says where an aim that is not here is missed."""
    results = Path(study_report.__file__).parents[2] / "benchmarks/results/cpu"
    times, total = {}, {}
    for protocol in "AB":
        found = study_report.summaries(study.read_rows(results / f"study_watch_{protocol}.csv"))
        full, own = found["full"], found["lora_edge, no search"]
        assert len(own.f1) == 30
        assert own.share_percent <= 0.5
        assert np.mean(list(own.minus(full).values())) >= -0.010
        published = found["lora_edge_paper, rank 6" if protocol == "B" else "lora_edge_paper"]
        assert published.share_percent <= 1.49
        assert np.mean(list(published.minus(full).values())) >= -0.047
        for name, other in found.items():
            if 0 < other.trainable <= 3 * own.trainable:
                middle, half = study_report.interval(list(other.minus(own).values()))
                assert middle <= half, name
        times[protocol], total[protocol] = np.median(own.times_shorter(full)), own.shorter_in_total(full)
    for found_times in (times, total):
        assert min(found_times.values()) >= 1.4
        assert max(found_times.values()) >= 3.8
    batch = found["lora_edge_batch_bn_turned, no search"]  # of protocol B
    for name in ("head_only", "bn_only"):
        ahead = batch.minus(found[name])
        assert len(ahead) == 10
        assert all(difference > 0 for difference in ahead.values()), name


def test_the_readmes_results_are_those_of_the_committed_rows():
    root = Path(study_report.__file__).parents[2]
    page = (root / "README.md").read_text()
    text, _ = study_report.report(sorted((root / "benchmarks/results/cpu").glob("study_*.csv")))
    assert study_report.replace_between_marks(page, text) == page, "run make results"
